"""Run by torchrun, or alone: load a model as `generate` does and say how much memory that took.

`parallel_memory.py MODEL MODE OUTPUT`: MODE is "alone" in one process. Writes {"growth", "held", "mapped"} to
OUTPUT.RANK: bytes that the process grew by, bytes of the weights it holds, and of each shard of Meta's, what it read.
"""

import ctypes
import json
import re
import sys
from pathlib import Path

import torch

from hf_llama3.distributed.parallel import join
from hf_llama3.text.loading import load_model

folder, mode, output = sys.argv[1:]


def resident() -> int:
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free but not yet given back is several MB, more or less
    return int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def mapped() -> dict[str, int]:
    """Resident bytes of each mapped file of weights, by its name."""
    found = {}
    for entry in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        if name := re.search(r"(consolidated\.\d\d)\.pth", entry):
            found[name[1]] = found.get(name[1], 0) + int(re.search(r"Rss:\s+(\d+) kB", entry)[1]) * 1024
    return found


with join(None if mode == "alone" else mode) as group, torch.inference_mode():
    small, _ = load_model(f"{folder}-small", group=group)  # what the libraries take once
    small(torch.ones(1, 4, dtype=torch.long))
    before = resident()
    model, _ = load_model(folder, group=group)
    model(torch.ones(1, 4, dtype=torch.long))
    local = [getattr(parameter, "_local_tensor", parameter) for parameter in model.parameters()]
    facts = {"growth": resident() - before, "held": sum(part.nbytes for part in local), "mapped": mapped()}
    Path(f"{output}.{group.rank}").write_text(json.dumps(facts))
