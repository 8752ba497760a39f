"""Run `hf-llama3` as a user does: in a process of its own."""

import contextlib
import io
import os
import subprocess
import sys
from unittest import mock

import pytest

from hf_llama3.cli import main


def run(*arguments, cwd=None, code=0, **environment):
    """Run a command and return its output; `code` is the exit status that it must end with."""
    result = subprocess.run(
        [sys.executable, "-m", "hf_llama3", *map(str, arguments)],
        capture_output=True, text=True, cwd=cwd, env=os.environ | environment, check=False,
    )  # fmt: skip
    assert result.returncode == code, f"exit {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


def refuse(*arguments):
    """Run a command that must be refused: exit 2, one sentence on standard error, nothing on standard output.

    In this process: the imports of a fresh one take longer than the refusal.
    """
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["hf-llama3", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as exit_info,
    ):
        main()
    assert exit_info.value.code == 2 and out.getvalue() == ""
    lines = [line for line in err.getvalue().replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in err.getvalue(), err.getvalue()
    return lines[0]
