"""A conversation in the terminal, streamed."""

import torch
from transformers import TextStreamer, set_seed

from hf_llama3.errors import UserError, for_terminal

from . import MAX_NEW_TOKENS
from .completion import check_lengths, check_sampling, check_unicode, encode, generation_options
from .template import apply_template


def chat(
    model,
    tokenizer,
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
):
    """Answer line after line until the input ends; Ctrl-C stops an answer, and the conversation keeps its beginning.

    Raises:
        UserError: the tokenizer has no chat template, or a number is out of its range.
    """
    check_sampling(max_new_tokens, temperature, top_p, seed)
    if tokenizer.chat_template is None:
        raise UserError("a conversation needs a chat template, got a tokenizer without one; use hf-llama3 generate")
    set_seed(seed)
    turns = []
    while True:
        try:
            line = input("> ")
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            print()
            return
        if not line.strip():
            continue
        try:
            check_unicode(line)
        except UserError as error:
            print(error)
            continue
        turns.append({"role": "user", "content": line})
        ids = encode(tokenizer, apply_template(tokenizer, [turns])[0], with_special=False)
        try:
            check_lengths(model, len(ids), max_new_tokens)
        except UserError as error:
            print(f"{error}\nThe conversation starts afresh.")
            turns = []
            continue
        answer = say(model, tokenizer, ids, max_new_tokens, generation_options(model, tokenizer, temperature, top_p))
        turns.append({"role": "assistant", "content": answer})


def say(model, tokenizer, ids: list[int], max_new_tokens: int, options: dict) -> str:
    """Stream the model's answer to the terminal and return it; Ctrl-C ends it early."""
    answer, prompt = Answer(tokenizer), torch.tensor([ids], device=model.device)
    try:
        with torch.inference_mode():
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=max_new_tokens,
                streamer=answer,
                **options,
            )
    except KeyboardInterrupt:
        answer.end()
    return answer.text


class Answer(TextStreamer):
    """A streamer that prints an answer and keeps it."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False):
        self.text += text
        super().on_finalized_text(for_terminal(text), stream_end)
