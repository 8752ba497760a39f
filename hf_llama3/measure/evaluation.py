"""How well a model predicts a text: its loss in nats per token and its perplexity."""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from hf_llama3.cpu.optimization import quantization_of
from hf_llama3.errors import UserError
from hf_llama3.files.progress import bar
from hf_llama3.files.reading import read_file
from hf_llama3.text.completion import check_range, encode

LARGEST_CONTEXT = 2048  # tokens, if `context` is omitted: a longer one takes longer and predicts better
MOST_BYTES = 2**26  # of a text, which is cut into tokens as one
POSITIONS_AT_A_TIME = 256  # whose logits are in memory together: 128 MiB of Llama 3's vocabulary in float32


@dataclass
class Evaluation:
    """Describe how well a model predicts each token of a text from those before it in the same window."""

    model: str
    text: str
    tokens: int  # predicted
    loss: float  # nats per token
    perplexity: float  # e to the loss
    context: int  # tokens per window
    dtype: str
    quantize: str | None
    seconds: float

    def to_dict(self) -> dict:
        return asdict(self)


def evaluate(model, tokenizer, text, context: int | None = None, progress: bool = False) -> Evaluation:
    """Compute the mean loss over a whole text, cut into windows that do not see each other.

    If the tokenizer adds a begin token, every window begins with it, and the whole text is predicted. Otherwise the
    last target of a window is the first input of the next, and all but the first token of the text is predicted.

    Args:
        text: file in UTF-8.
        context: number of tokens in a window; if omitted, the model's, but at most 2,048.

    Raises:
        UserError: the text cannot be read or has less than two tokens, or the context is not within the model's.
    """
    text, started = Path(text), time.perf_counter()
    window = model.config.max_position_embeddings
    context = min(window, LARGEST_CONTEXT) if context is None else context
    check_range("--context", context, 1, window)
    try:
        content = read_file(text, MOST_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{text} cannot be read: {error}; pass a text file in UTF-8") from error
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = (
        True  # the windows below are shorter
    )
    ids = encode(tokenizer, content, with_special=False)
    start = [token for token in encode(tokenizer, "") if token == tokenizer.bos_token_id]
    if len(ids) < 2:
        raise UserError(f"{text} must have at least two tokens to predict one from another, got {len(ids)}")

    total, seen = 0.0, 0
    first = 0 if start else 1  # what is predicted first
    positions = range(first, len(ids), context)
    for position in bar(iterable=positions, desc="evaluating", unit="window", disable=not progress):
        targets = ids[position : position + context]
        before = start or ids[position - 1 : position]
        total += sum_of_losses(model, before + targets[:-1], targets)
        seen += len(targets)
    loss = total / seen
    return Evaluation(
        model=model.name_or_path,
        text=str(text),
        tokens=seen,
        loss=loss,
        perplexity=math.exp(loss),
        context=context,
        dtype=str(model.dtype).removeprefix("torch."),
        quantize=quantization_of(model),
        seconds=round(time.perf_counter() - started, 1),
    )


@torch.inference_mode()
def sum_of_losses(model, inputs: list[int], targets: list[int]) -> float:
    """Return the sum of the losses in nats; the logits are computed for a few positions at a time."""
    ids = torch.tensor([inputs], device=model.device)
    states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]  # (T, E)
    head, labels = model.get_output_embeddings(), torch.tensor(targets, device=states.device)
    total = 0.0
    for part, wanted in zip(states.split(POSITIONS_AT_A_TIME), labels.split(POSITIONS_AT_A_TIME), strict=True):
        total += torch.nn.functional.cross_entropy(head(part).float(), wanted, reduction="sum").item()
    return total
