"""Every command that the README shows, run as it stands, on a small model and text under the names it uses."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from checkpoints import params, real_tokenizer, write_meta
from command_line import run

from hf_llama3.cli.main import app
from hf_llama3.quickstart import python_documentation

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(<!-- not run: (?P<reason>.+?) -->\n)?```(?P<language>bash|python)\n(?P<code>.*?)```", re.DOTALL)
SET_UP = "pip install -c constraints.txt"  # run by .ci/run, in new environments


def blocks():
    return [match.groupdict() for match in BLOCK.finditer((ROOT / "README.md").read_text("utf-8"))]


def commands(block):
    """Split a shell block into its commands; a Python block has none."""
    lines = block["code"].splitlines() if block["language"] == "bash" else []
    split = [shlex.split(line, comments=True) for line in lines if line.strip()]
    return [["hf-llama3", *one[one.index("hf_llama3") + 1 :]] if one[0] == "torchrun" else one for one in split]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    write_meta(folder / "Meta-Llama-3-8B", params(vocab=128256), tokenizer=real_tokenizer())
    (folder / "my-text.txt").write_text(python_documentation()[:30_000], "utf-8")
    return folder


def test_every_block_runs(workplace, monkeypatch):
    """In the order of the README, since later blocks use what earlier ones made; our own commands in this process."""
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    ran = 0
    for block in blocks():
        if block["reason"] or SET_UP in block["code"]:
            continue
        lines = block["code"].splitlines() if block["language"] == "bash" else [block["code"]]
        for line in filter(str.strip, lines):
            if line.startswith("hf-llama3 "):
                run(*shlex.split(line, comments=True)[1:])
            else:
                command = ["bash", "-euc", line] if block["language"] == "bash" else [sys.executable, "-c", line]
                result = subprocess.run(command, capture_output=True, text=True, check=False)
                assert result.returncode == 0, f"{line}\n{result.stderr}"
            ran += 1
    assert ran >= 24


def test_options_of_every_block_exist():
    """Of those that are not run as well: no option is shown that the command line does not have."""
    group = typer.main.get_command(app)
    for block in blocks():
        for name, *options in (command[1:] for command in commands(block) if command[0] == "hf-llama3"):
            group.commands[name].make_context(name, options).close()


def test_every_command_is_shown():
    text = (ROOT / "README.md").read_text("utf-8")
    for command in app.registered_commands:
        assert f"hf-llama3 {command.callback.__name__}" in text
