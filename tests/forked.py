"""Run Python in processes that have imported the libraries already: to import them takes four seconds.

Each is forked from a server that has done nothing else, and takes what `python` takes: `-c CODE`, `-m MODULE` or a
script, with arguments. What depends on the order of imports, or on variables that libraries read as they are imported,
is run by `subprocess` instead, and what is about torchrun itself by `torchrun.py`.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
from multiprocessing.connection import wait
from pathlib import Path
from subprocess import CompletedProcess

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["hf_llama3.cli.main", "hf_llama3.conversion.load", "hf_llama3.text.prompts", "hf_llama3.training.recipe"]
)
SECONDS = 300  # after which a process is killed


def python(*arguments, standard_input="", **environment) -> CompletedProcess:
    """Run one process to its end, as `subprocess.run` does, with more variables in its environment."""
    return run(arguments, [environment], standard_input)


def torchrun(*arguments, count=2) -> CompletedProcess:
    """Run processes that know one another by what torchrun sets; the first that fails ends the others, as there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    all_have = meeting | {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return run(arguments, [all_have | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)])


def run(arguments, environments, standard_input="") -> CompletedProcess:
    """Run a process in each environment; what they write comes together, with the status of the first that failed."""
    arguments, running, failed = [str(argument) for argument in arguments], [], []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "in").write_text(standard_input)
        for number, more in enumerate(environments):
            files = [f"{folder}/in", f"{folder}/out{number}", f"{folder}/err{number}"]
            process = CONTEXT.Process(target=become, args=(arguments, os.getcwd(), os.environ | more, files))
            process.start()
            running.append(process)
        while running:
            ended = wait([process.sentinel for process in running], timeout=SECONDS)
            for process in [process for process in running if process.sentinel in ended]:
                running.remove(process)
                process.join()
                if process.exitcode:
                    failed.append(process.exitcode)
            for process in running if failed or not ended else ():
                process.terminate() if ended else process.kill()
        out, err = (
            "".join(Path(f"{folder}/{kind}{number}").read_text("utf-8") for number in range(len(environments)))
            for kind in ("out", "err")
        )
    return CompletedProcess(arguments, failed[0] if failed else 0, out, err)


def become(arguments: list[str], folder: str, environment: dict[str, str], files: list[str]):
    """Go on as `python ARGUMENTS` in a folder, with an environment and standard streams of files."""
    for number, (name, flags) in enumerate(zip(files, (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY), strict=True)):
        opened = os.open(name, flags | os.O_CREAT)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    kind, *rest = arguments
    if kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(kind).parent))
        runpy.run_path(kind, run_name="__main__")
