"""What a new user is told: help, completion, and an answer to what was mistyped that says what to type instead."""

import os
import shlex

import pytest
import typer.main
from checkpoints import params, write_meta
from command_line import refuse, run

from hf_llama3.cli.app import GROUPS
from hf_llama3.cli.main import app

GROUP = typer.main.get_command(app)


@pytest.mark.parametrize("name", GROUP.commands)
def test_help_ends_with_a_worked_example(name):
    """One that the command line takes, from the name of the command to the last option."""
    example = GROUP.commands[name].epilog
    start, told, *arguments = shlex.split(example.removeprefix("Example: "))
    assert (start, told) == ("hf-llama3", name)
    GROUP.commands[name].make_context(name, arguments).close()
    for flag in ("--help", "-h"):
        assert " ".join(run(name, flag).stdout.split()).endswith(" ".join(example.split()))


def test_help_without_a_command():
    assert run().stdout == run("--help").stdout == run("-h").stdout
    assert all(f" {name} " in run().stdout for name in GROUP.commands)


def test_groups_stand_in_the_order_of_the_work():
    """A model is made before it is asked, measured and published."""
    places = [run("--help").stdout.index(f"─ {group} ─") for group in GROUPS]
    assert places == sorted(places)
    assert {command.rich_help_panel for command in GROUP.commands.values()} == set(GROUPS)


# What Tab gives


def complete(monkeypatch, *words):
    monkeypatch.setenv("_HF_LLAMA3_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", " ".join(("hf-llama3", *words)))
    monkeypatch.setenv("COMP_CWORD", str(len(words)))
    return run().stdout.split()


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("qu",), ["quickstart"]),
        (("train", "--tok"), ["--tokenizer"]),
        (("train", "--preset", "shakespeare-c"), ["shakespeare-cpu"]),
        (("train", "--preset", "shakespear-cpu", "--tok"), ["--tokenizer"]),  # no question while it is typed
        (("generate", "m", "--quantize", "int"), ["int8", "int4"]),
        (("chat", "m", "--quantize", "int8", "--dtype", "b"), ["bfloat16"]),
        (("generate", "m", "--parallel", "t"), ["tensor"]),
        (("inspect", "m", "--device-map", "b"), ["balanced", "balanced_low_0"]),
        (("convert", "a", "b", "--as", ""), ["llama", "llama3", "torchtitan"]),
        (("convert", "a", "b", "--to", ""), ["hf", "meta", "gguf", "dcp"]),
    ],
)
def test_completion(words, found, monkeypatch):
    assert complete(monkeypatch, *words) == found


def test_completion_can_be_installed():
    """The script that a shell is to read; which shell is asked for here, and looked for elsewhere."""
    script = run("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1").stdout
    assert "complete -o default -F _hf_llama3_completion" in script


# What is mistyped


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train'? Try: hf-llama3 --help"),
        (["help"], "No such command 'help'. Try: hf-llama3 --help"),
        (["convert"], "Missing argument 'source'. Example: hf-llama3 convert Meta-Llama-3-8B/original llama-3-8b"),
        (["evaluate", "m"], "Missing option '--text'. Example: hf-llama3 evaluate llama-3-8b --text held-out.txt"),
        (["inspect", "m", "--josn"], "No such option: --josn (Possible options: --json). Example: hf-llama3 inspect"),
        (["verify", "a", "b", "c"], "Got unexpected extra argument(s) (c). Example: hf-llama3 verify"),
        (["convert", "a", "b", "--mp", "two"], "Invalid value for '--mp': "),
        (["train", "--text", "t", "--output", "o", "--preset", "shakespear-cpu"], "did you mean 'shakespeare-cpu'?"),
        (["generate", "m", "hi", "--quantize", "int-8"], "--quantize has no 'int-8'; did you mean 'int8'?"),
        (["generate", "m", "hi", "--parallel", "tensors"], "--parallel has no 'tensors'; did you mean 'tensor'?"),
        (["generate", "m", "hi", "--dtype", "BFloat16"], "--dtype has no 'BFloat16'; did you mean 'bfloat16'?"),
        (["convert", "a", "b", "--to", "HF"], "--to has no 'HF'; did you mean 'hf'?"),
        (["convert", "a", "b", "--as", "lama3"], "--as has no 'lama3'; did you mean 'llama3'?"),
        (["inspect", "m", "--device-map", "blanced"], "--device-map has no 'blanced'; did you mean 'balanced'?"),
    ],
)
def test_mistyped(typed, message):
    assert message in refuse(*typed)


# What lies elsewhere


def test_folder_above_a_checkpoint(tmp_path):
    write_meta(tmp_path / "meta", params())
    assert refuse("inspect", tmp_path).endswith(f"it holds meta; pass {tmp_path / 'meta'}")


def test_folder_of_the_hubs_cache(tmp_path):
    """The folder of a repository and not of one of its commits, of which the newest is named."""
    repository = tmp_path / "models--somebody--model"
    for commit in ("ffff", "0000"):
        write_meta(repository / "snapshots" / commit, params())
    os.utime(repository / "snapshots" / "0000", (2**31, 2**31))
    assert refuse("inspect", repository).endswith(f"it holds snapshots; pass {repository / 'snapshots' / '0000'}")


def test_folder_that_may_not_be_read(tmp_path):
    (tmp_path / "closed").mkdir(mode=0)
    if os.access(tmp_path / "closed", os.R_OK):
        pytest.skip("this user may read everything")
    sentence = "closed cannot be opened: Permission denied; run as a user who may read it"
    assert refuse("inspect", tmp_path / "closed").endswith(sentence)


def test_quickstart_where_nothing_can_be_written():
    assert "/proc/q could not be written (" in (sentence := refuse("quickstart", "--output", "/proc/q"))
    assert sentence.endswith("; choose another --output")


@pytest.mark.parametrize(
    "words", [["train", "--output", "o", "--text", "no.txt"], ["train", "--output", "o", "--text", "."]]
)
def test_text_that_is_none(words):
    assert refuse(*words).endswith("; pass a text file")
