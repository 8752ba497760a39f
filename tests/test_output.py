"""Output that cannot be written: bars are dropped, a result is missed in one sentence, and the work is done."""

import os
import subprocess
import sys

import pytest
from checkpoints import params, write_meta

from hf_llama3.conversion import convert, inspect

pytestmark = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")


@pytest.fixture
def meta(tmp_path):
    write_meta(tmp_path / "meta", params())
    return tmp_path / "meta"


def run_into(redirection, *arguments):
    command = f'exec "$@" {redirection}'
    words = [sys.executable, "-m", "hf_llama3", *map(str, arguments)]
    return subprocess.run(["sh", "-c", command, "sh", *words], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-"])
def test_bars_that_cannot_be_written(redirection, meta, tmp_path):
    """A bar that raised kept its lock, and the next one waited for it without end."""
    result = run_into(redirection, "convert", meta, tmp_path / "hf")
    assert result.returncode == 0 and "target" in result.stdout, result
    assert inspect(tmp_path / "hf").format == "hf"


def test_an_error_that_cannot_be_written(tmp_path):
    assert run_into("2>/dev/full", "inspect", tmp_path / "none").returncode == 2


@pytest.mark.parametrize("command", [["inspect"], ["inspect", "--json"], ["convert", "TARGET"], ["--help"]])
def test_a_result_that_cannot_be_written(command, meta, tmp_path):
    places = [tmp_path / "hf" if word == "TARGET" else word for word in command[1:]]
    source = [] if command == ["--help"] else [meta]
    result = run_into(">/dev/full", command[0], *source, *places)
    last = result.stderr.replace("\r", "\n").strip().splitlines()[-1]
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert last.startswith("error: standard output could not be written (No space left on device); "), last


def test_a_reader_that_goes_away(meta):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "hf_llama3", "inspect", str(meta)]
    result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    os.close(write)
    assert result.returncode == 141 and result.stderr == ""


def test_bars_of_the_library(meta, tmp_path):
    code = f"from hf_llama3.conversion import convert; convert({str(meta)!r}, {str(tmp_path / 'x')!r}, progress=True)"
    with open("/dev/full", "w") as full:
        subprocess.run([sys.executable, "-c", code], stderr=full, timeout=120, check=False)
    convert(meta, tmp_path / "y")
    names = sorted(path.name for path in (tmp_path / "y").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "x").iterdir())
