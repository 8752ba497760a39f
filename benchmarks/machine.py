"""What every benchmark prints first: the machine that its figures belong to."""

from hf_llama3.cpu import processor
from hf_llama3.measure.bench import measure_read_speed


def describe_machine() -> str:
    """Name the processor and what torch may use of it, torch's threads, and how fast they read memory."""
    read = measure_read_speed("cpu") / 1e9
    return f"{processor.here()}, {processor.threads()} thread(s) of torch, memory read at {read:.1f} GB/s"
