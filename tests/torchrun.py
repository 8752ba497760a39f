"""Start processes by torchrun, as a user does."""

import os
import socket
import subprocess
import sys

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(filter(None, sys.path))}


def torchrun(*arguments, count=2):
    """Run a script, or a module after "-m", in two processes or more; returns the finished torchrun."""
    return start("--standalone", f"--nproc-per-node={count}", *arguments)


def torchrun_on_two_nodes(*arguments):
    """Run it by two torchruns of one process each, which find one another as those of two machines do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = ["--master-addr=127.0.0.1", f"--master-port={free.getsockname()[1]}"]
    nodes = ["--nnodes=2", "--nproc-per-node=1", *meeting]
    other = subprocess.Popen(command(*nodes, "--node-rank=1", *arguments), env=ENVIRONMENT, stdout=subprocess.PIPE)
    result = start(*nodes, "--node-rank=0", *arguments)
    return result, other.communicate(timeout=60)[0]


def start(*arguments):
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=300
    )


def command(*arguments):
    return [sys.executable, "-m", "torch.distributed.run", *map(str, arguments)]
