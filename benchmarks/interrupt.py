"""Every command that writes, killed, and with a disk that is full, at many points: `python benchmarks/interrupt.py`.

A command runs in a copy of this process. It is killed after a share of the time that it takes, or may write no more
than a share of the bytes of its largest file (RLIMIT_FSIZE, which the system answers as it does a full disk). Then its
target must be absent, unfinished or whole, its source what it was, and the same command must end with what an
undisturbed run makes: `train` with --resume where its folder says so.
"""

import argparse
import contextlib
import hashlib
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

from machine import describe_machine

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "conversion"))

TEXT = "The quick brown fox jumps over the lazy dog. " * 400
TRAIN = ("train", "--text", "text.txt", "--output", "OUT", "--layers", "1", "--hidden-size", "16", "--heads", "2")
TRAIN += ("--kv-heads", "1", "--context", "8", "--steps", "6", "--eval-every", "2", "--tokenizer", "char")
COMMANDS = {
    "convert to hf": ("convert", "meta", "OUT"),
    "convert to meta": ("convert", "hf", "OUT", "--mp", "2"),
    "convert to dcp": ("convert", "hf", "OUT", "--to", "dcp"),
    "convert to gguf": ("convert", "hf", "OUT.gguf", "--to", "gguf"),
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
VARYING = ("training.json", "curves.png", "trainer_state.json", "training_args.bin", "provenance.json", "SHA256SUMS")
VARYING += (".metadata", "checklist.chk")


def make(folder: Path):
    """Make what the commands read."""
    from checkpoints import params, small_tokenizer, write_meta

    from hf_llama3.conversion import convert

    write_meta(folder / "meta", params(vocab=516), tokenizer=small_tokenizer(folder))
    for name in ("hf", "hf-old"):
        convert(folder / "meta", folder / name, max_shard_size="100KB")
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


def again(folder: Path, command) -> int:
    """Give the same command, with --resume where it asks for that, or nothing where all is there."""
    code = finish(start(folder, command))
    said = (folder.parent / "said.txt").read_text(errors="replace")
    if code == 2 and "add --resume" in said:
        return finish(start(folder, (*command, "--resume")))
    return 0 if code == 2 and "already exists" in said else code


def sweep(name: str, command, source: Path, points: int) -> list[str]:
    """Interrupt a command at so many points in both ways; returns what went wrong."""
    folder, problems = source.parent / "run", []

    def fresh():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)

    fresh()
    began = time.perf_counter()
    if code := finish(start(folder, command)):
        return [f"{name}: exit {code} without an interruption"]
    seconds, expected = time.perf_counter() - began, contents(folder)
    largest = max(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    given = contents(source, but=("hf-old",))
    for point in range(points):
        for how in ("killed", "full"):
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
            if code := again(folder, command):
                problems.append(f"{where}: then exit {code}: {(folder.parent / 'said.txt').read_text()[-300:]}")
            elif (found := contents(folder)) != expected:
                differing = sorted(file for file in found.keys() | expected if found.get(file) != expected.get(file))
                problems.append(f"{where}: then other files: {differing[:5]}")
    return problems


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=60, help="of each command and of each way")
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
            problems = sweep(name, COMMANDS[name], source, options.points)
            print(
                f"{name:<20} {options.points} kills, {options.points} full disks, {len(problems)} problems", flush=True
            )
            for problem in problems[:5]:
                print(f"  {problem}", flush=True)
            found += problems
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
