"""Every command that writes, killed, and with a disk that is full, at many points: `python benchmarks/interrupt.py`.

A command runs in a copy of this process. It is killed after a share of the time that it takes, or may write no more
than a share of the bytes of its largest file (RLIMIT_FSIZE, which the system answers as it does a full disk). Then its
target must be absent, unfinished or whole, its source what it was, and the same command must end with what an
undisturbed run makes, and nothing else: `train` with --resume where its folder says so.
"""

import argparse
import contextlib
import hashlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

from machine import describe_machine
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "conversion"))

TEXT = "The quick brown fox jumps over the lazy dog. " * 400
TRAIN = ("train", "--text", "text.txt", "--output", "OUT", "--layers", "1", "--hidden-size", "16", "--heads", "2")
TRAIN += ("--kv-heads", "1", "--context", "8", "--steps", "6", "--eval-every", "2", "--tokenizer", "char")
COMMANDS = {
    "convert to hf": ("convert", "meta", "OUT"),
    "convert to meta": ("convert", "hf", "OUT", "--mp", "2"),
    "convert to dcp": ("convert", "hf", "OUT", "--to", "dcp"),
    "convert to gguf": ("convert", "hf", "OUT.gguf", "--to", "gguf"),
    "convert an adapter": ("convert", "adapter", "adapter-old", "--overwrite"),
    "convert --overwrite": ("convert", "meta", "hf-old", "--overwrite"),
    "pack": ("pack", "hf", "OUT", "--quantize", "int8"),
    "train": TRAIN,
    "card": ("card", "hf", "--license", "mit", "--output", "OUT.md"),
    "generate --output": (
        "generate",
        "hf",
        "--prompts",
        "prompts.txt",
        "--max-new-tokens",
        "4",
        "--output",
        "OUT.jsonl",
    ),
}
WAYS = ("killed", "full")  # by SIGKILL; by a disk that is full
IN_PARTS = ("train", "generate --output")  # whose target grows in its place
VARYING = ("training.json", "curves.png", "trainer_state.json", "training_args.bin", "provenance.json", "SHA256SUMS")
VARYING += (".metadata", "checklist.chk")


def make(folder: Path):
    """Make what the commands read."""
    import torch
    from checkpoints import params, small_tokenizer, write_meta
    from safetensors.torch import save_file

    from hf_llama3.conversion import convert

    write_meta(folder / "meta", params(vocab=516), tokenizer=small_tokenizer(folder))
    for name in ("hf", "hf-old"):
        convert(folder / "meta", folder / name, max_shard_size="100KB")
    for name, alpha in (("adapter-old", 1), ("adapter", 2)):
        (folder / name).mkdir()
        config = {"peft_type": "LORA", "r": 64, "lora_alpha": alpha, "base_model_name_or_path": "hf"}
        (folder / name / "adapter_config.json").write_text(json.dumps(config))
        module = "base_model.model.model.layers.0.self_attn.q_proj"
        matrices = {f"{module}.lora_{end}.weight": torch.full((64, 64), alpha / 8) for end in "AB"}
        save_file(matrices, folder / name / "adapter_model.safetensors")
    (folder / "text.txt").write_text(TEXT)
    (folder / "prompts.txt").write_text("".join(f"abc {number}\n" for number in range(24)))


def start(folder: Path, command, most_bytes: int | None = None) -> int:
    """Run a command in a copy of this process; returns the number of that."""
    process = os.fork()
    if process:
        return process
    code = 99
    try:
        os.chdir(folder)
        with open(folder.parent / "said.txt", "w") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        if most_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
        from hf_llama3.cli.main import main

        tqdm.set_lock(threading.RLock())  # copies share the usual one, and one that was killed may hold it
        sys.argv = ["hf-llama3", *command]
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def finish(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def contents(folder: Path, but=()) -> dict[str, str]:
    """Return the hash of every file, but of those that tell times."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in VARYING and path.relative_to(folder).parts[0] not in but
    }


def is_whole(target: str, folder: Path, found: dict, old: dict, new: dict) -> bool:
    """Tell whether a target is as before or as it should become; between two renames it may stand aside."""
    found, old, new = (
        {file: one for file, one in all_.items() if file.split("/")[0] == target} for all_ in (found, old, new)
    )
    return found in (old, new) or (not found and (folder / f"{target}.replaced-by-hf-llama3").exists())


def again(folder: Path, command) -> int:
    """Give the same command, with --resume where it asks for that, or nothing where all is there."""
    code = finish(start(folder, command))
    said = (folder.parent / "said.txt").read_text(errors="replace")
    if code == 2 and "add --resume" in said:
        return finish(start(folder, (*command, "--resume")))
    return 0 if code == 2 and "already exists" in said else code


def sweep(name: str, command, source: Path, points: int, ways) -> list[str]:
    """Interrupt a command at so many points in each of some ways; returns what went wrong."""
    folder, problems = source.parent / "run", []

    def fresh():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)

    fresh()
    began = time.perf_counter()
    if code := finish(start(folder, command)):
        return [f"{name}: exit {code} without an interruption"]
    seconds, expected = time.perf_counter() - began, contents(folder)
    names = {path.name for path in folder.iterdir()}
    target = next(word for word in command if word.startswith("OUT") or word.endswith("-old"))
    largest = max(path.stat().st_size for path in [folder / target, *(folder / target).rglob("*")] if path.is_file())
    before, given = contents(source), contents(source, but=(target,))
    for point in range(points):
        for how in ways:
            fresh()
            share = (point + 0.5) / points
            process = start(folder, command, int(largest * share**3) if how == "full" else None)
            if how == "killed":
                time.sleep(seconds * share)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            code = finish(process)
            said = (folder.parent / "said.txt").read_text(errors="replace")
            where = f"{name}, {how} at {share:.1%}"
            if how == "full" and (code not in (0, 2) or "Traceback" in said):
                problems.append(f"{where}: exit {code}: {said[-300:]}")
            found = contents(folder)
            if any(found.get(file) != content for file, content in given.items()):
                problems.append(f"{where}: what it reads was changed")
            if name not in IN_PARTS and not is_whole(target, folder, found, before, expected):
                problems.append(f"{where}: the target is neither the old one nor the new one")
            if code := again(folder, command):
                problems.append(f"{where}: then exit {code}: {(folder.parent / 'said.txt').read_text()[-300:]}")
            elif (found := contents(folder)) != expected:
                differing = sorted(file for file in found.keys() | expected if found.get(file) != expected.get(file))
                problems.append(f"{where}: then other files: {differing[:5]}")
            elif others := names ^ {path.name for path in folder.iterdir()}:
                problems.append(f"{where}: then left or lost: {sorted(others)}")
    return problems


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=60, help="of each command and of each way")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="how it is stopped")
    parser.add_argument("commands", nargs="*", help=f"of {', '.join(COMMANDS)}; all if omitted")
    options = parser.parse_args()
    print(describe_machine(), flush=True)
    import hf_llama3.text.loading
    import hf_llama3.text.prompts
    import hf_llama3.training.recipe  # noqa: F401  (or every copy would import them anew)

    found = []
    with tempfile.TemporaryDirectory() as made:
        source = Path(made) / "source"
        source.mkdir()
        make(source)
        for name in options.commands or COMMANDS:
            problems = sweep(name, COMMANDS[name], source, options.points, options.ways)
            done = f"{options.points} times {' and '.join(options.ways)}"
            print(f"{name:<20} {done}, {len(problems)} problems", flush=True)
            for problem in problems[:5]:
                print(f"  {problem}", flush=True)
            found += problems
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
