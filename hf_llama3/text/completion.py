"""Prompts in, completions out."""

import math
from dataclasses import asdict, dataclass

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, StopStringCriteria, set_seed

from hf_llama3.errors import UserError, library_errors, quoted

from . import MAX_NEW_TOKENS
from .template import apply_template

MOST_OF_A_STOP = 256  # characters of a text that ends a completion: every token is looked for at each of them
PREFILL_CHUNK = 2048  # prompt tokens computed at a time: bounded memory, and matrices large enough to be fast


@dataclass
class Completion:
    prompt: str
    text: str  # the new tokens
    token_ids: list[int]  # of `text`

    def to_dict(self) -> dict:
        return asdict(self)


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
    """Complete each prompt; a model tuned for dialogue gets it as a user's turn.

    Args:
        max_new_tokens: at most, for each prompt; fewer where a stop token or a text of `stop` comes first.
        temperature: 0 takes the likeliest token each time.
        top_p: sample from the likeliest tokens that make up this share of the probability.

    Raises:
        UserError: a number is out of its range, or a prompt and its new tokens do not fit the context window.
    """
    check_sampling(max_new_tokens, temperature, top_p, seed)
    if not prompts:
        raise UserError("there must be at least one prompt, got none")
    rows = tokenize(tokenizer, prompts)
    check_lengths(model, max(map(len, rows)), max_new_tokens)
    check_rows(model, tokenizer, rows)
    return generate_rows(model, tokenizer, prompts, rows, max_new_tokens, temperature, top_p, seed, stop)


def generate_rows(
    model, tokenizer, prompts, rows, max_new_tokens: int, temperature: float, top_p: float, seed: int, stop
) -> list[Completion]:
    """Complete prompts that are checked already and tokenised to `rows`; see `generate_text`."""
    longest = max(map(len, rows))
    options = generation_options(model, tokenizer, temperature, top_p)
    stop_texts = StopTexts(tokenizer, stop)
    set_seed(seed)
    with torch.inference_mode():
        output = model.generate(
            **pad_left(rows, options["pad_token_id"], input_device(model)),
            max_new_tokens=max_new_tokens,
            stopping_criteria=StoppingCriteriaList([stop_texts] if stop else []),
            prefill_chunk_size=PREFILL_CHUNK if longest > PREFILL_CHUNK else None,
            **options,
        )
    stops = stop_tokens(model)
    completions = []
    for number, (prompt, row) in enumerate(zip(prompts, output.tolist(), strict=True)):
        ids = until_stop(row[longest : stop_texts.ends.get(number)], stops)
        completions.append(Completion(prompt, tokenizer.decode(ids, skip_special_tokens=True), ids))
    return completions


def tokenize(tokenizer, prompts: list[str]) -> list[list[int]]:
    """Return the token ids of each prompt, as a user's turn where the tokenizer has a chat template."""
    texts, is_chat = prompts, tokenizer.chat_template is not None
    if is_chat:
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
        texts = apply_template(tokenizer, turns)
    return encode(tokenizer, texts, with_special=not is_chat)


def encode(tokenizer, text: str | list[str], with_special: bool = True) -> list:
    """Return the token ids of a text, or of each.

    Raises:
        UserError: it is no Unicode, or the tokenizer has no token for a part of it and none for what it does not know.
    """
    for one in [text] if isinstance(text, str) else text:
        check_unicode(one)
    with library_errors("the model's tokenizer fails at a text", "write its tokenizer.json again"):
        return tokenizer(text, add_special_tokens=with_special)["input_ids"]


def check_unicode(text: str):
    """Refuse what was typed in another encoding than UTF-8: Python keeps each byte of it as half of a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        wrong = quoted(text[error.start : error.end])
        raise UserError(f"a text must be in UTF-8, got {wrong} at character {error.start}; write it anew") from error


def check_sampling(max_new_tokens: int, temperature: float, top_p: float, seed: int):
    check_range("--max-new-tokens", max_new_tokens, 1, math.inf)
    check_range("--temperature", temperature, 0, 100)
    check_range("--top-p", top_p, 1e-6, 1)
    check_range("--seed", seed, 0, 2**32 - 1)


def check_lengths(model, prompt_tokens: int, new_tokens: int):
    """Check, before any work, that no prompt is empty and each fits the context window with its new tokens.

    Raises:
        UserError: one is empty or does not fit.
    """
    window = model.config.max_position_embeddings
    if prompt_tokens + new_tokens > window:
        raise UserError(
            f"a prompt of {prompt_tokens} tokens and {new_tokens} new ones must fit the model's context of {window}; "
            "shorten the prompt or lower --max-new-tokens"
        )
    if not prompt_tokens:
        raise UserError("a prompt must have at least one token, got none; write some text")


def check_rows(model, tokenizer, rows: list[list[int]]):
    """Check that the model's embedding has a row for every token.

    Raises:
        UserError: a token has none.
    """
    largest, limit = max(max(row, default=0) for row in rows), model.config.vocab_size
    if largest >= limit:
        name = quoted(tokenizer.convert_ids_to_tokens(largest))
        raise UserError(
            f"the prompt holds {name}, whose id {largest} has no row in the embedding of {limit}; leave it out, or "
            f"give it one by resize_token_embeddings({largest + 1}) and save the model"
        )


def generation_options(model, tokenizer, temperature: float, top_p: float) -> dict:
    """Return the options of `model.generate` for sampling and padding; temperature 0 is greedy."""
    stops = stop_tokens(model)
    padding = tokenizer.pad_token_id
    if padding is None or padding >= model.config.vocab_size:  # it has no row, and is masked anyway
        padding = stops[0] if stops else 0
    if not temperature:
        return {"pad_token_id": padding, "do_sample": False}
    return {"pad_token_id": padding, "do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}


class StopTexts(StoppingCriteria):
    """Stop a row at the first of some texts and remember its end: `generate` fills the row until the longest has ended.

    Raises:
        UserError: in `__init__`, a text is too long, or the library cannot tell what the tokenizer's tokens spell.
    """

    def __init__(self, tokenizer, texts: list[str] | None):
        self.ends = {}  # row -> its tokens, prompt included
        if (longest := max(map(len, texts or []), default=0)) > MOST_OF_A_STOP:
            raise UserError(f"--stop must be at most {MOST_OF_A_STOP} characters, got {longest}; shorten it")
        try:
            self.criterion = StopStringCriteria(tokenizer, texts) if texts else None
        except ValueError as error:  # the library expects Latin letters in what it decodes
            kind = type(tokenizer).__name__
            raise UserError(
                f"--stop needs a tokenizer that spells Latin letters, got {kind} without; leave it out"
            ) from error

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        stopped = self.criterion(input_ids, scores, **kwargs)
        for row in stopped.nonzero().flatten().tolist():
            self.ends.setdefault(row, input_ids.shape[1])
        return stopped


def stop_tokens(model) -> list[int]:
    stops = model.generation_config.eos_token_id
    return stops if isinstance(stops, list) else [stops] if stops is not None else []


def check_range(name: str, value: float, smallest: float, largest: float):
    if not smallest <= value <= largest:
        raise UserError(f"{name} must be between {smallest:g} and {largest:g}, got {value}")


def input_device(model) -> torch.device:
    """Return the device for prompts: that of the first weight which is not offloaded."""
    if model.device.type != "meta":
        return model.device
    gpus = [device for device in model.hf_device_map.values() if isinstance(device, int)]
    return torch.device(gpus[0] if gpus else "cpu")


def pad_left(rows: list[list[int]], padding: int, device) -> dict[str, torch.Tensor]:
    """Pad prompts on the left to one length, so that all completions begin at the same place."""
    longest = max(map(len, rows))
    ids = [[padding] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


def until_stop(row: list[int], stops: list[int]) -> list[int]:
    """Cut a row after its first stop token."""
    end = next((index + 1 for index, token in enumerate(row) if token in stops), len(row))
    return row[:end]
