"""Generation in one process and in two, by every mode; and what each device would hold of the large models, by sizes.

    python benchmarks/parallel.py
    python benchmarks/parallel.py --layers 16 --dtype float32
    python benchmarks/parallel.py sizes

Each process has one thread; the runs are interleaved; the machine comes first, the ratios to one process last. In
`data` mode two processes complete two prompts in the time of one, in the others both work on the same prompt. On one
machine the processes share the memory's bandwidth: what is measured is what dividing costs, and what each one holds.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from generation import GEOMETRY
from machine import describe_machine

MODES = ("alone", "data", "tensor", "pipeline")
LARGE = {"8B": "3.1-8B", "70B": "3.1-70B", "405B": "3.1-405B"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=["measure", "sizes", "run"], default="measure")
    parser.add_argument("--layers", type=int, default=4, help="of the 1B geometry's 16")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--steps", type=int, default=16, help="tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where there is room")
    parser.add_argument("--mode", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part == "sizes":
        print_sizes()
    elif args.part == "run":
        run(args)
    else:
        print(describe_machine(), flush=True)
        with tempfile.TemporaryDirectory(dir=args.folder, prefix="parallel-benchmark-") as folder:
            measure(args, Path(folder))
        print_sizes()


def measure(args, folder: Path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**GEOMETRY, num_hidden_layers=args.layers, dtype=args.dtype)
    LlamaForCausalLM(config).to(getattr(torch, args.dtype)).save_pretrained(folder)
    found = {mode: [] for mode in MODES}
    for number in range(args.rounds):
        for mode in MODES:
            print(f"round {number + 1} of {args.rounds}: {mode}", file=sys.stderr)
            found[mode].append(start(args, mode, folder))
    print(f"\n1B geometry, {args.layers} layers, {args.dtype}, one thread a process\n")
    print(
        "| Mode | Processes | tokens/s | of one | GB of weights each | peak GB each |\n|---|---:|---:|---:|---:|---:|"
    )
    speed = {mode: statistics.median(facts[0]["speed"] for facts in runs) for mode, runs in found.items()}
    for mode, runs in found.items():
        held = ", ".join(f"{facts['held'] / 1e9:.2f}" for facts in runs[0])
        peak = ", ".join(f"{facts['peak'] / 1e9:.2f}" for facts in runs[0])
        count = len(runs[0])
        print(f"| {mode} | {count} | {speed[mode]:.1f} | {speed[mode] / speed['alone']:.2f} | {held} | {peak} |")


def start(args, mode: str, folder: Path) -> list[dict]:
    """Run a mode and return what each process found."""
    command = [__file__, "run", "--mode", mode, "--folder", folder, "--prompt", args.prompt, "--steps", args.steps]
    launch = [] if mode == "alone" else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *launch, *map(str, command)], check=True, env=environment)
    paths = sorted(folder.glob("facts.*"))
    facts = [json.loads(path.read_text()) for path in paths]
    for path in paths:
        path.unlink()
    return facts


def run(args):
    """Load a model as `generate --parallel` does, and time its steps."""
    from transformers import AutoModelForCausalLM

    from hf_llama3.distributed.parallel import join, number_own_layers
    from hf_llama3.measure.bench import time_generation

    with join(None if args.mode == "alone" else args.mode) as group:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(args.folder, dtype="auto", **group.loading_options()).eval()
        if group.mode == "pipeline":
            number_own_layers(model)
        time_generation(model, args.prompt, 2)
        started = time.perf_counter()
        _, steps = time_generation(model, args.prompt, args.steps)
        print(f"{time.perf_counter() - started:.1f} s", file=sys.stderr)
        held = sum(getattr(part, "_local_tensor", part).nbytes for part in model.parameters())
        peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
        facts = {"speed": group.shares / statistics.median(steps), "held": held, "peak": peak}
        (args.folder / f"facts.{group.rank}").write_text(json.dumps(facts))


def print_sizes():
    from hf_llama3 import Llama3Config
    from hf_llama3.distributed.parallel import bytes_per_process
    from hf_llama3.presets import config_of

    print("\nGB of bfloat16 weights that the fullest of N processes holds, and GB of keys and values of 8,192 tokens\n")
    print("| Model | one | tensor 2 | 4 | 8 | pipeline 2 | 4 | 8 | keys and values |\n|---|" + "---:|" * 8)
    for name, preset in LARGE.items():
        config, cells = Llama3Config(**config_of(preset)), []
        for mode, count in [("data", 1), *((mode, count) for mode in ("tensor", "pipeline") for count in (2, 4, 8))]:
            cells.append(f"{max(bytes_per_process(config, torch.bfloat16, mode, count)) / 1e9:.1f}")
        cache = 2 * 2 * 8192 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        print(f"| {name} | " + " | ".join(cells) + f" | {cache / 1e9:.1f} |")


if __name__ == "__main__":
    main()
