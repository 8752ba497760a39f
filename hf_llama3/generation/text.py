"""Prompts in, completions out, in any of the formats that this package knows."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import hf_llama3  # noqa: F401  (registers the type "llama3")
from hf_llama3.conversion.load import load_meta, load_meta_tokenizer
from hf_llama3.conversion.opening import open_checkpoint
from hf_llama3.errors import UserError

from .defaults import DTYPES, MAX_NEW_TOKENS


@dataclass
class Completion:
    prompt: str
    text: str  # what was added
    token_ids: list[int]  # of `text`

    def to_dict(self) -> dict:
        return asdict(self)


def load_model(name: str, dtype: str = "auto", rope_factor: float | None = None):
    """Load a model and its tokenizer from a local folder of either format, or else by its name on the Hub.

    Raises:
        UserError: the folder holds no whole checkpoint or no tokenizer, or the name is unknown.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype must be one of {DTYPES}, got {dtype!r}")
    path = Path(name)
    if path.exists():
        checkpoint = open_checkpoint(path, rope_factor)  # reads no tensor, and its errors are sentences
        if checkpoint.tokenizer is None:
            raise UserError(f"{checkpoint.path} holds no tokenizer, without which there is no text; add its files")
        if checkpoint.format == "meta":
            model = load_meta(path, rope_factor=rope_factor, dtype=dtype)
            return model.eval(), load_meta_tokenizer(path, rope_factor=rope_factor)
        name = str(checkpoint.path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise UserError(f"the tokenizer of {name} cannot be loaded: {str(error).splitlines()[0]}") from error
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).eval(), tokenizer
    except (OSError, ValueError) as error:
        raise UserError(f"{name} cannot be loaded: {str(error).splitlines()[0]}") from error


def generate_text(
    model,
    tokenizer,
    prompts: list[str],
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: list[str] | None = None,
) -> list[Completion]:
    """Complete each prompt; a model tuned for dialogue is given it as a user's turn.

    Args:
        max_new_tokens: at most, for each prompt; fewer where a stop token or a text of `stop` comes first.
        temperature: 0 takes the likeliest token each time.
        top_p: sample from the likeliest tokens that make up this share of the probability.

    Raises:
        UserError: a number out of its range, or a prompt and the new tokens do not fit the context window.
    """
    check_range("--max-new-tokens", max_new_tokens, 1, math.inf)
    check_range("--temperature", temperature, 0, 100)
    check_range("--top-p", top_p, 1e-6, 1)
    check_range("--seed", seed, 0, 2**32 - 1)
    if not prompts:
        raise UserError("there must be at least one prompt, got none")
    texts, is_chat = prompts, tokenizer.chat_template is not None
    if is_chat:
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
        texts = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    rows = tokenizer(texts, add_special_tokens=not is_chat)["input_ids"]

    window, longest = model.config.max_position_embeddings, max(map(len, rows))
    if longest + max_new_tokens > window:
        raise UserError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones must fit the model's context of {window}; "
            "shorten the prompt or lower --max-new-tokens"
        )
    if not longest:
        raise UserError("a prompt must have at least one token, got none; write some text")
    stops = model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops] if stops is not None else []
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0] if stops else 0
    inputs = pad_left(rows, padding, model.device)
    set_seed(seed)
    sampling = {"do_sample": False}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    with torch.inference_mode():
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            pad_token_id=padding,
            tokenizer=tokenizer,
            stop_strings=stop or None,
            **sampling,
        )
    completions = []
    for prompt, row in zip(prompts, output[:, longest:].tolist(), strict=True):
        ids = until_stop(row, stops, padding)
        completions.append(Completion(prompt, tokenizer.decode(ids, skip_special_tokens=True), ids))
    return completions


def check_range(name: str, value: float, smallest: float, largest: float):
    if not smallest <= value <= largest:
        raise UserError(f"{name} must be between {smallest:g} and {largest:g}, got {value}")


def pad_left(rows: list[list[int]], padding: int, device) -> dict[str, torch.Tensor]:
    """Bring prompts to one length, so that each ends where its completion begins."""
    longest = max(map(len, rows))
    ids = [[padding] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


def until_stop(row: list[int], stops: list[int], padding: int) -> list[int]:
    """Cut a row after its first stop token, and what `generate` adds to rows that ended before the longest."""
    end = next((index + 1 for index, token in enumerate(row) if token in stops), len(row))
    while end and row[end - 1] == padding and padding not in stops:
        end -= 1
    return row[:end]
