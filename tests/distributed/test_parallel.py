"""Several processes generate what one does: by tensor, by layer, by share of the prompts."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import torch
from checkpoints import params, small_tokenizer, write_meta
from command_line import call, refuse
from torchrun import torchrun

from hf_llama3 import Llama3Config
from hf_llama3.conversion import convert, inspect
from hf_llama3.distributed.parallel import Group, bytes_per_process
from hf_llama3.errors import UserError, for_terminal
from hf_llama3.files.locking import locked
from hf_llama3.presets import config_of
from hf_llama3.text import loading, prompts

TEXTS = ["abc", "a longer prompt than the others", "b", "what comes after this?", "abcd" * 8, "x y z", "Ω≈ç"]
OPTIONS = ["--max-new-tokens", 6, "--dtype", "float32"]
GEOMETRIES = {"grouped": {}, "tied": {"tied": True}}
MODES = ("data", "tensor", "pipeline")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Directories of Meta's in two shards, the folders converted from them, and a file of prompts."""
    root = tmp_path_factory.mktemp("models")
    for name, options in GEOMETRIES.items():
        shape = params(vocab=516, layers=4)
        write_meta(root / f"{name}-meta", shape, mp=2, tokenizer=small_tokenizer(root), **options)
        convert(root / f"{name}-meta", root / name)
    (root / "prompts.txt").write_text("\n".join(TEXTS) + "\n", "utf-8")
    return root


@pytest.fixture(scope="module")
def alone(folders):
    """What one process makes of each model."""
    prompts = ["--prompts", folders / "prompts.txt"]
    return {name: json.loads(call("generate", folders / name, *prompts, *OPTIONS, "--json")[1]) for name in GEOMETRIES}


@pytest.fixture(scope="module")
def together(folders, tmp_path_factory):
    """What two processes make of each, in every mode, from both formats; all in one start of torchrun."""
    root, runs = tmp_path_factory.mktemp("runs"), {}
    for mode in MODES:
        for name in ("grouped", "grouped-meta", "tied", "tied-meta"):
            arguments = ["generate", folders / name, "--prompts", folders / "prompts.txt", *OPTIONS]
            runs[mode, name] = [*arguments, "--json", "--parallel", mode, "--batch-size", 2]
    arguments = ["generate", folders / "grouped", "--prompts", folders / "prompts.txt", *OPTIONS]
    runs["text"] = [*arguments, "--parallel", "data"]
    runs["file"] = [*arguments, "--parallel", "data", "--batch-size", 1, "--output", root / "out.jsonl"]
    (root / "runs.json").write_text(json.dumps([list(map(str, arguments)) for arguments in runs.values()]))
    result = forked.torchrun(Path(__file__).parent / "parallel_runs.py", root / "runs.json", root / "came")
    assert result.returncode == 0, result.stderr
    came = [json.loads((root / f"came.{rank}").read_text()) for rank in range(2)]
    return {name: [process[index] for process in came] for index, name in enumerate(runs)} | {"root": root}


@pytest.mark.parametrize("form", ["", "-meta"], ids=["HF", "Meta"])
@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("mode", MODES)
def test_tokens_are_those_of_one_process(mode, name, form, alone, together):
    (code, out, err), (other_code, other_out, _) = together[mode, name + form]
    assert code == other_code == 0, err
    assert json.loads(out) == alone[name]
    assert other_out == ""


def test_decoding_in_parallel_gathers_on_the_first_process(alone, together):
    """The recipe by which every process decodes its share: text and bar come from the first, in order; one file."""
    (_, out, err), (_, _, other_err) = together["text"]
    assert out == "".join(for_terminal(one["prompt"] + one["text"]) + "\n" for one in alone["grouped"])
    assert "generating" in err and other_err == ""
    (_, out, _), (_, other_out, _) = together["file"]
    lines = (together["root"] / "out.jsonl").read_text("utf-8").splitlines()
    assert list(map(json.loads, lines)) == alone["grouped"]
    assert sorted(path.name for path in together["root"].iterdir()) == ["came.0", "came.1", "out.jsonl", "runs.json"]
    assert re.search(r"prompts +7\n", out) and other_out == ""


@pytest.mark.parametrize(
    ("mode", "changes", "count", "sentence"),
    [
        ("tensor", {}, 4, r"divides `num_key_value_heads` 2, got 4"),
        ("tensor", {"num_key_value_heads": 8, "vocab_size": 510}, 4, r"divides `vocab_size` 510, got 4"),
        ("pipeline", {}, 3, r"a layer for each process, got 2 layers and 3 processes"),
    ],
)
def test_what_cannot_be_divided_is_refused(mode, changes, count, sentence):
    shape = {"num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 512}
    config = Llama3Config(**shape | {"hidden_size": 64, "intermediate_size": 96} | changes)
    with pytest.raises(UserError, match=sentence):
        Group(mode, 0, count).check(config)
    Group(mode, 0, 2).check(config)
    Group("data", 0, count).check(config)


@pytest.mark.parametrize("mode", MODES)
def test_bytes_from_sizes(mode):
    """The 8B model over two: what transformers divides it into, and for tensors at most 0.56 of the whole."""
    config = Llama3Config(**config_of("3.1-8B"))
    whole, held = 2 * 8_030_261_248, bytes_per_process(config, torch.bfloat16, mode, 2)
    assert {"data": held[0] == whole, "tensor": held[0] <= 0.56 * whole, "pipeline": sum(held) == whole}[mode]


@pytest.mark.parametrize("mode", ["tensor", "pipeline"])
def test_each_process_holds_and_reads_its_part(mode, tmp_path):
    """Measured, where layers are most of the model: it grows as the sizes say, and of two shards reads its own."""
    for name, dim, ffn in (("model", 1024, 2816), ("model-small", 64, 192)):
        shape = params(dim=dim, layers=4, vocab=516, ffn_dim_multiplier=1.03 if dim == 1024 else 1.1)
        write_meta(tmp_path / name, shape, mp=2, tokenizer=small_tokenizer(tmp_path), ffn=ffn)
    script = Path(__file__).parent / "parallel_memory.py"
    forked.python(script, tmp_path / "model", "alone", tmp_path / "alone").check_returncode()
    result = forked.torchrun(script, tmp_path / "model", mode, tmp_path / "two")
    assert result.returncode == 0, result.stderr
    alone = json.loads((tmp_path / "alone.0").read_text())
    two = [json.loads((tmp_path / f"two.{rank}").read_text()) for rank in range(2)]
    config = Llama3Config.from_dict(inspect(tmp_path / "model").config)
    assert [facts["held"] for facts in two] == bytes_per_process(config, torch.bfloat16, mode, 2)
    for facts in two:
        assert facts["growth"] / alone["growth"] == pytest.approx(facts["held"] / alone["held"], abs=0.08)
    if mode == "tensor":
        for rank, facts in enumerate(two):
            own, other = (facts["mapped"].get(f"consolidated.{shard:02d}", 0) for shard in (rank, 1 - rank))
            assert own > 0.5 * facts["held"] and other < 0.01 * facts["held"]


def test_one_process_says_what_is_wrong(folders, tmp_path):
    """All of them end, and soon."""
    started = time.perf_counter()
    result = torchrun("-m", "hf_llama3", "generate", folders / "nowhere", "abc", "--parallel", "tensor")
    assert result.returncode and result.stderr.count("error") >= 1
    assert len([line for line in result.stderr.splitlines() if line.startswith("error")]) == 1, result.stderr
    (tmp_path / "long.txt").write_text("short\n" + "ab" * 2**19)
    arguments = ["generate", folders / "tied", "--prompts", tmp_path / "long.txt", "--parallel", "data"]
    result = forked.torchrun("-m", "hf_llama3", *arguments)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert len(lines) == 1 and "must fit the model's context" in lines[0]
    assert time.perf_counter() - started < 120


@pytest.mark.parametrize("command", ["generate", "train"])
def test_fewer_devices_than_processes(command, folders, tmp_path):
    """One GPU for two processes: both know before they join, and the first says so. The GPU is made believe."""
    script = tmp_path / "one_device.py"
    script.write_text(
        "import torch\n"
        "from hf_llama3.distributed import parallel\n"
        "parallel.device_type = lambda: 'cuda'\n"
        "torch.accelerator.device_count = lambda: 1\n"
        "from hf_llama3.cli.main import main\n"
        "main()\n"
    )
    text = folders / "prompts.txt"
    arguments = ["--text", text, "--output", tmp_path / "out", "--tokenizer", "char"]
    if command == "generate":
        arguments = [folders / "grouped", "--prompts", text, *OPTIONS, "--parallel", "data"]
    result = forked.torchrun(script, command, *arguments)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert lines == ["error: each process needs a GPU of its own, got 1 for 2; start 1"], result.stderr
    assert result.returncode and "Traceback" not in result.stderr.split("torch/distributed")[0], result.stderr
    assert not (tmp_path / "out").exists()


def test_an_error_of_one_process_alone_is_said(folders, tmp_path):
    """Before they have joined, while the first waits for the other, which meets what the first does not."""
    script = tmp_path / "alone.py"
    script.write_text(
        "import os, sys\n"
        "if os.environ['LOCAL_RANK'] == '1':\n"
        "    sys.argv[sys.argv.index('--parallel') + 1] = 'both'\n"
        "from hf_llama3.cli import main\n"
        "main.SECONDS_TO_SPEAK = 3\n"
        "main.main()\n"
    )
    result = forked.torchrun(script, "generate", folders / "grouped", "a", "--parallel", "data")
    lines = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert result.returncode and len(lines) == 1, result.stderr
    assert lines[0].startswith("error (process 1): ") and "both" in lines[0]


def test_a_lost_process_ends_all(folders, tmp_path):
    """One is killed while the others wait for it; none hangs."""
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, signal\n"
        "from hf_llama3.text import prompts\n"
        "original = prompts.generate_rows\n"
        "def killed(*arguments):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return original(*arguments)\n"
        "prompts.generate_rows = killed\n"
        "from hf_llama3.cli.main import main\n"
        "main()\n"
    )
    arguments = ["generate", folders / "grouped", "--prompts", folders / "prompts.txt", *OPTIONS, "--parallel", "data"]
    result = torchrun(script, *arguments)
    assert result.returncode and "Signal 9 (SIGKILL)" in result.stderr
    assert "Traceback" not in result.stderr.split("torch/distributed")[0], result.stderr


def test_a_silent_process_ends_all(folders, tmp_path):
    """One never comes to the exchange: after the time-out the other says so."""
    script = tmp_path / "silent.py"
    script.write_text(
        "import datetime, os, time\n"
        "from hf_llama3.distributed import parallel\n"
        "from hf_llama3.text import prompts\n"
        "parallel.TIMEOUT = datetime.timedelta(seconds=3)\n"
        "original = prompts.generate_rows\n"
        "prompts.generate_rows = lambda *these: time.sleep(200) if os.environ['RANK'] == '1' else original(*these)\n"
        "from hf_llama3.cli.main import main\n"
        "main()\n"
    )
    started = time.perf_counter()
    arguments = ["generate", folders / "grouped", "--prompts", folders / "prompts.txt", *OPTIONS, "--parallel", "data"]
    result = forked.torchrun(script, *arguments)
    assert result.returncode and time.perf_counter() - started < 150
    lines = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert len(lines) == 1 and "another process was lost" in lines[0], result.stderr


def test_an_interrupted_run_goes_on(folders, alone, tmp_path):
    """Killed after some prompts: what was written stays, and the same command completes the rest."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(TEXTS * 40) + "\n", "utf-8")
    output, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    arguments = ["generate", folders / "grouped", "--prompts", prompts, *OPTIONS, "--output", output, "--batch-size", 1]
    command = [sys.executable, "-m", "hf_llama3", *map(str, arguments)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    lines = partial / "completions.jsonl"
    while process.poll() is None and not (lines.exists() and lines.read_text("utf-8").count("\n") > 8):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not output.exists()
    with lines.open("a") as file:
        file.write('{"prompt": "torn')
    done = lines.read_text("utf-8").count("\n")
    assert 8 < done < len(TEXTS) * 40

    other = [7 if value == 6 else value for value in arguments]
    assert "was begun with another max_new_tokens; give the same, or remove it" in refuse(*other)
    prompts.write_text("\n".join(TEXTS * 40) + "\n", "utf-8")
    result = forked.torchrun("-m", "hf_llama3", *arguments, "--parallel", "data", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {"output": str(output), "prompts": len(TEXTS) * 40, "completed_earlier": done}
    assert list(map(json.loads, output.read_text("utf-8").splitlines())) == alone["grouped"] * 40
    assert not partial.exists()
    assert "already exists; choose another --output" in refuse(*arguments)


def test_a_file_is_written_by_one_run_alone(folders, tmp_path):
    output = tmp_path / "out.jsonl"
    arguments = ["generate", folders / "grouped", "a", *OPTIONS, "--output", output]
    with locked(output.with_name("out.jsonl.partial"), output):
        assert f"another run is writing {output}" in refuse(*arguments)
    assert call(*arguments)[0] == 0 and len(output.read_text("utf-8").splitlines()) == 1
    assert list(tmp_path.iterdir()) == [output]


def test_what_is_refused_leaves_nothing_behind(folders, tmp_path):
    """Neither an option out of its range nor a prompt that does not fit begins a file."""
    model, output, prompts = folders / "grouped", tmp_path / "out.jsonl", tmp_path / "prompts.txt"
    options = ["--output", output, "--max-new-tokens", 4]
    assert "--temperature must be between" in refuse("generate", model, "a", *options, "--temperature", 1000)
    assert "--batch-size must be at least 1, got 0" in refuse("generate", model, "a", *options, "--batch-size", 0)
    prompts.write_text("short\n" + "ab" * 2**19)
    assert "must fit the model's context" in refuse("generate", model, "--prompts", prompts, *options)
    prompts.write_text("")
    assert "there must be at least one prompt, got none" in refuse("generate", model, "--prompts", prompts, *options)
    assert list(tmp_path.iterdir()) == [prompts]
    (tmp_path / "out.jsonl.partial").mkdir()  # of a run that was killed before it wrote
    prompts.write_text("abc\n")
    assert call("generate", model, "--prompts", prompts, *options)[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "prompts.txt"]


def test_a_file_belongs_to_one_model(folders, tmp_path):
    """Two directories of Meta's are two models."""
    output = tmp_path / "out.jsonl"
    folder = tmp_path / "out.jsonl.partial"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts, "complete_from", lambda *arguments: iter([None]))  # stopped as it writes
        with pytest.raises(AttributeError):
            call("generate", folders / "grouped-meta", "a", *OPTIONS, "--output", output)
    assert json.loads((folder / "settings.json").read_text())["model"] == str(folders / "grouped-meta")
    sentence = refuse("generate", folders / "tied-meta", "a", *OPTIONS, "--output", output)
    assert f"{folder} was begun with another model; give the same, or remove it" in sentence


def test_paths_are_checked_before_loading(folders, tmp_path):
    model, pipe = folders / "grouped", tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "load_model", None)
        assert "--prompts must name a file, got" in refuse("generate", model, "--prompts", tmp_path / "none")
        assert "a folder or a pipe" in refuse("generate", model, "--prompts", pipe)
        assert ". already exists; choose another --output" in refuse("generate", model, "a", "--output", ".")


def test_options_that_do_not_go_together(folders, monkeypatch):
    model = folders / "grouped"
    assert "--parallel must be one of" in refuse("generate", model, "a", "--parallel", "both")
    assert "--parallel needs several processes, got 1" in refuse("generate", model, "a", "--parallel", "data")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "2 processes must be told how to share the work" in refuse("generate", model, "a")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("hf_llama3.cli.main.SECONDS_TO_SPEAK", 0)
    code, out, err = call("generate", model, "a")
    assert (code, out) == (2, "") and err.startswith("error (process 1): 2 processes must be told"), "nobody else did"
