"""The speed of generation, compared with the speed at which this machine reads memory."""

import itertools
import statistics
import time
from dataclasses import asdict, dataclass

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from hf_llama3.cpu import processor
from hf_llama3.errors import UserError
from hf_llama3.text.completion import check_range

READ_BYTES = 2**29  # read to measure the memory's speed
COPIES = 20  # on a GPU, between two looks at the clock
ROUNDS = 3


@dataclass
class Bench:
    """Describe how fast a model generates; times are medians."""

    prompt_tokens: int
    new_tokens: int
    batch_size: int
    threads: int
    device: str
    weight_gigabytes: float  # read for every token
    prefill_tokens_per_second: float
    milliseconds_per_token: float  # of one step, whatever the batch
    tokens_per_second: float  # of all rows
    read_gigabytes_per_second: float  # that the memory gives
    share_of_read: float  # of that speed, that reading the weights at each step comes to

    def to_dict(self) -> dict:
        return asdict(self)


def bench(model, prompt_tokens: int = 64, new_tokens: int = 32, batch_size: int = 1) -> Bench:
    """Measure `model.generate` on random prompts, greedily.

    Raises:
        UserError: the tokens do not fit the model's context, or a number is out of its range.
    """
    window = model.config.max_position_embeddings
    check_range("--prompt-tokens", prompt_tokens, 1, window)
    check_range("--new-tokens", new_tokens, 2, window)
    check_range("--batch-size", batch_size, 1, 4096)
    if prompt_tokens + new_tokens > window:
        raise UserError(
            f"--prompt-tokens and --new-tokens must fit the model's context of {window}, got {prompt_tokens} and "
            f"{new_tokens}; lower one"
        )
    prefills, steps, read = [], [], measure_read_speed(model.device)
    for _ in range(ROUNDS):
        prefill, between = time_generation(model, prompt_tokens, new_tokens, batch_size)
        prefills.append(prefill)
        steps += between
    step, weight = statistics.median(steps), weight_bytes(model)
    return Bench(
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch_size=batch_size,
        threads=processor.threads(),
        device=torch.cuda.get_device_name() if model.device.type == "cuda" else processor.here().name,
        weight_gigabytes=float(f"{weight / 1e9:.3g}"),
        prefill_tokens_per_second=round(batch_size * prompt_tokens / statistics.median(prefills), 1),
        milliseconds_per_token=round(step * 1e3, 2),
        tokens_per_second=round(batch_size / step, 1),
        read_gigabytes_per_second=round(read / 1e9, 1),
        share_of_read=float(f"{weight / step / read:.3g}"),
    )


def time_generation(
    model, prompt_tokens: int, new_tokens: int, batch_size: int = 1, **options
) -> tuple[float, list[float]]:
    """Return the seconds until the first new token, and the seconds from each token to the next."""
    clock = Clock()
    prompt = torch.randint(model.config.vocab_size, (batch_size, prompt_tokens), device=model.device)
    settings = {
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "do_sample": False,
        "pad_token_id": 0,
    } | options
    started = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), stopping_criteria=StoppingCriteriaList([clock]), **settings
        )
    return clock.times[0] - started, [after - before for before, after in itertools.pairwise(clock.times)]


class Clock(StoppingCriteria):
    """Record the time of each token; it never stops generation."""

    def __init__(self):
        self.times = []

    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def weight_bytes(model) -> int:
    """Return the number of bytes of linear weights that a decode step reads."""
    total = 0
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            kernel = getattr(module, "kernel", None)
            total += kernel.num_bytes if kernel is not None else bytes_in_memory(module.weight)
    return total


def bytes_in_memory(weight: torch.Tensor) -> int:
    """Return the bytes of a tensor, or of the tensors that it consists of (torchao's quantised weights)."""
    if not hasattr(weight, "__tensor_flatten__"):
        return weight.nbytes
    return sum(bytes_in_memory(getattr(weight, name)) for name in weight.__tensor_flatten__()[0])


def measure_read_speed(device: torch.device | str) -> float:
    """Return bytes per second: the best of several reads of more than the processor's caches hold.

    On a GPU a copy is timed, and both its reads and its writes count, because a sum is slower than the memory.
    """
    numbers = torch.ones(READ_BYTES // 8, dtype=torch.int64, device=device)
    if numbers.is_cuda:
        return measure_copy_speed(numbers)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        numbers.sum().item()
        best = min(best, time.perf_counter() - started)
    return READ_BYTES / best


def measure_copy_speed(numbers: torch.Tensor) -> float:
    """Return bytes per second, read and written, of many copies on a GPU; a single copy is too short to time."""
    copy, seconds = torch.empty_like(numbers), []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(COPIES):
            copy.copy_(numbers)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * COPIES * numbers.nbytes / min(seconds)
