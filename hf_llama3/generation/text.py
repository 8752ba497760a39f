"""Prompts in, completions out, in any of the formats that this package knows."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import hf_llama3  # noqa: F401  (registers the type "llama3")
from hf_llama3.conversion.checkpoint import locate
from hf_llama3.conversion.load import load_meta, load_meta_tokenizer
from hf_llama3.errors import UserError


@dataclass
class Completion:
    prompt: str
    text: str  # what was added
    token_ids: list[int]  # of `text`

    def to_dict(self) -> dict:
        return asdict(self)


def load_model(name: str, dtype: str = "auto"):
    """Load a model and its tokenizer from a local folder of either format, or else by its name on the Hub.

    Raises:
        UserError: the folder holds no checkpoint or no tokenizer, or the name is unknown.
    """
    known = getattr(torch, dtype, None)
    if dtype != "auto" and not (isinstance(known, torch.dtype) and known.is_floating_point):
        raise UserError(f"--dtype must be auto or a type such as bfloat16, got {dtype!r}")
    path = Path(name)
    if path.exists():
        folder = locate(path)
        if not (folder / "config.json").exists():
            return load_meta(folder, dtype=dtype).eval(), load_meta_tokenizer(folder)
        name = str(folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).eval()
        return model, AutoTokenizer.from_pretrained(name)
    except OSError as error:
        raise UserError(f"{name} cannot be loaded: {str(error).splitlines()[0]}") from error


def generate_text(
    model,
    tokenizer,
    prompts: list[str],
    max_new_tokens: int = 100,
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
        UserError: a prompt and the new tokens do not fit the context window.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    texts, is_chat = prompts, tokenizer.chat_template is not None
    if is_chat:
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
        texts = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=not is_chat).to(model.device)

    window, longest = model.config.max_position_embeddings, inputs["input_ids"].shape[1]
    if longest + max_new_tokens > window:
        raise UserError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones must fit the model's context of {window}; "
            "shorten the prompt or lower --max-new-tokens"
        )
    set_seed(seed)
    sampling = {"do_sample": False}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    with torch.inference_mode():
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            tokenizer=tokenizer,
            stop_strings=stop or None,
            **sampling,
        )
    completions = []
    for prompt, row in zip(prompts, output[:, longest:].tolist(), strict=True):
        ids = without_padding(row, tokenizer.pad_token_id)
        completions.append(Completion(prompt, tokenizer.decode(ids, skip_special_tokens=True), ids))
    return completions


def without_padding(row: list[int], pad_token_id: int) -> list[int]:
    """Cut what `generate` adds to rows that ended before the longest; where padding is the stop token, keep one."""
    end = len(row)
    while end and row[end - 1] == pad_token_id:
        end -= 1
    return row[:end]
