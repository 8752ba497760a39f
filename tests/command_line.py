"""Run `hf-llama3` as a user does."""

import contextlib
import io
import os
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

from hf_llama3.cli.main import main


def run(*arguments, cwd=None, code=0, fresh=False, **environment):
    """Run a command and return its output; `code` is the exit status that it must end with.

    In a process of its own where it is to be `fresh` or has another folder or environment. Elsewhere in this one: the
    imports of a fresh process would take most of the time.
    """
    if fresh or cwd or environment:
        command, environment = [sys.executable, "-m", "hf_llama3", *map(str, arguments)], os.environ | environment
        result = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)
    else:
        result = SimpleNamespace(**dict(zip(("returncode", "stdout", "stderr"), call(*arguments), strict=True)))
    assert result.returncode == code, f"exit {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


def call(*arguments):
    """Run a command in this process; returns its exit status, standard output and standard error."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", ["hf-llama3", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    return code, out.getvalue(), err.getvalue()


def refuse(*arguments):
    """Run a command that must be refused: exit 2, one sentence on standard error, nothing on standard output."""
    code, out, err = call(*arguments)
    assert code == 2 and out == "", err
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in err, err
    return lines[0]
