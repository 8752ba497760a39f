"""Time and memory of conversions against a plain copy of the same bytes, in one interleaved run.

    python benchmarks/conversion.py --size 1B
    python benchmarks/conversion.py --size 8B --rounds 2
    python benchmarks/conversion.py --size 1B --upstream /path/to/python   # where transformers 4.46.3 is installed

Random weights of the size's geometry are written in Meta's format, then every job runs once a round, each after a
`cp -r` and `sync -f` of its source, which is as many bytes as the job writes. At most two copies of the model lie on
the disk at once, and none at the end. Memory is the largest RssAnon of the process (Linux); the machine comes first,
ratios last.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from machine import describe_machine

from hf_llama3.conversion.config.params import config_to_params
from hf_llama3.conversion.formats.meta import PARAMS_FILE
from hf_llama3.conversion.formats.pth import PthLayout
from hf_llama3.conversion.formats.storage import BLOCK_BYTES, BY_NAME, write_all
from hf_llama3.conversion.tokenizer.bpe import tiktoken_file
from hf_llama3.conversion.tokenizer.files import TOKENIZER_MODEL
from hf_llama3.conversion.weights import rows, sizes
from hf_llama3.files.json import to_json
from hf_llama3.presets import config_of, llama3_scaling

SIZES = {"1B": "3.2-1B", "8B": "3.1-8B"}
UPSTREAM = [
    *("-m", "transformers.models.llama.convert_llama_weights_to_hf"),
    *("--model_size", "1B", "--llama_version", "3.2", "--num_shards", "1"),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1B")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where there is room")
    parser.add_argument("--upstream", type=Path, help="a Python with transformers 4.46.3, the last with a converter")
    args = parser.parse_args()

    config = config_of(SIZES[args.size]) | {"rms_norm_eps": 1e-5, "rope_parameters": {"rope_theta": 500000.0}}
    config["rope_parameters"] |= llama3_scaling(8.0)
    config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    layout = PthLayout("consolidated.00", describe(config))
    free = shutil.disk_usage(args.folder).free
    if free < 2.2 * layout.size:
        needed = f"two copies of {layout.size:,} bytes"
        sys.exit(f"{args.folder} has {free:,} bytes free, and {args.size} needs {needed}; give --folder another disk")
    print(describe_machine(), flush=True)
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="conversion-benchmark-") as folder:
        folder = Path(folder)
        print(f"writing random weights of the {args.size} geometry, {layout.size:,} bytes ...", file=sys.stderr)
        write_random(folder / "meta", config, layout)
        jobs = {
            "Meta -> HF": ["--to", "hf", "--no-verify"],
            "Meta -> HF, verified": ["--to", "hf"],
            "Meta, 1 -> 8 shards": ["--to", "meta", "--mp", "8", "--no-verify"],
            "Meta, 1 -> 8 shards, verified": ["--to", "meta", "--mp", "8"],
        }
        results = run_jobs(folder / "meta", jobs, args)
        convert = [sys.executable, "-m", "hf_llama3", "convert"]
        subprocess.run([*convert, folder / "meta", folder / "hf", "--no-verify"], check=True, capture_output=True)
        shutil.rmtree(folder / "meta")
        jobs = {"HF -> Meta": ["--to", "meta", "--no-verify"], "HF -> Meta, verified": ["--to", "meta"]}
        results |= run_jobs(folder / "hf", jobs, args)
    report(results, layout.size)


def describe(config: dict) -> list:
    size = sizes(config)
    return [(row.meta, BY_NAME["bfloat16"], row.full_shape(size)) for row in rows(config["num_hidden_layers"])]


def write_random(folder: Path, config: dict, layout: PthLayout):
    """Write a directory of Meta's: normal weights from one block, which every tensor enters at another place."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    numbers = generator.standard_normal(BLOCK_BYTES, "f4") * 0.02
    block = (numbers.view("u4") >> 16).astype("<u2").tobytes()  # the upper halves of float32 are bfloat16
    ends = [*layout.offsets[1:], layout.size]
    with open(folder / "consolidated.00.pth", "wb", buffering=0) as out:
        out.truncate(layout.size)
        for offset, end in zip(layout.offsets, ends, strict=True):
            while offset < end:
                start = int(generator.integers(BLOCK_BYTES // 2)) * 2
                piece = block[start : start + min(BLOCK_BYTES, end - offset)]
                write_all(out, piece, offset)
                offset += len(piece)
        for offset, content in layout.fixed([0] * len(layout.offsets)):  # torch does not look at the CRC-32
            write_all(out, content, offset)
    (folder / PARAMS_FILE).write_bytes(to_json(config_to_params(config, folder, config["num_key_value_heads"])))
    # As many tokens as Llama 3 has, of lengths like its own: all bytes, then pairs, then triples.
    tokens = dict.fromkeys(bytes([byte]) for byte in range(256))
    for left in (first := list(tokens)) + [one + other for one in first for other in first]:
        tokens |= dict.fromkeys(left + right for right in first[:250])
        if len(tokens) > 128000:
            break
    (folder / TOKENIZER_MODEL).write_bytes(tiktoken_file(list(tokens)[:128000]))


def run_jobs(source: Path, jobs: dict[str, list[str]], args) -> dict[str, list[tuple[float, int, float]]]:
    """Run every job once a round, each after a copy of its source: {name: [(seconds, peak bytes, copy's seconds)]}."""
    commands = {
        name: [sys.executable, "-m", "hf_llama3", "convert", source, source.with_name("target"), *options]
        for name, options in jobs.items()
    }
    if args.upstream and source.name == "meta":
        places = ["--input_dir", source, "--output_dir", source.with_name("target")]
        commands["Meta -> HF, transformers 4.46.3"] = [args.upstream, *UPSTREAM, *places]
    results = {name: [] for name in commands}
    for number in range(args.rounds):
        for name, command in commands.items():
            print(f"round {number + 1} of {args.rounds}: {name}", file=sys.stderr)
            copied, _ = measure(["sh", "-c", f"cp -r '{source}' '{source}-copy' && sync -f '{source}-copy'"])
            shutil.rmtree(source.with_name(f"{source.name}-copy"))
            seconds, peak = measure(command)
            results[name].append((seconds, peak, copied))
            shutil.rmtree(source.with_name("target"))
            subprocess.run(["sync", "-f", source], check=True)
    return results


def measure(command: list) -> tuple[float, int]:
    """Run a command; return its seconds and the largest RssAnon of its process, in bytes."""
    started, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log)
        done = threading.Event()
        threading.Thread(target=lambda: (process.wait(), done.set())).start()
        while not done.wait(0.01):
            peak = max(peak, anonymous_bytes(process.pid))
        seconds = time.perf_counter() - started
        if process.returncode:
            log.seek(0)
            sys.exit(f"{command} failed: {log.read().decode()[-2000:]}")
    return seconds, peak


def anonymous_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has just ended, or this is not Linux
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0)


def report(results: dict[str, list[tuple[float, int, float]]], nbytes: int):
    print(f"\n{nbytes:,} bytes; medians of {len(next(iter(results.values())))} rounds\n")
    print("| Job | Seconds | `cp -r` and `sync -f` | RssAnon, MB | Ratio |\n|---|---:|---:|---:|---:|")
    for name, runs in results.items():
        seconds, peak, copied = (statistics.median(column) for column in zip(*runs, strict=True))
        ratio = statistics.median(taken / copy for taken, _, copy in runs)
        print(f"| {name} | {seconds:.1f} | {copied:.1f} | {peak / 1e6:.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
