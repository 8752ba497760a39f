"""Several processes: the losses of one, one folder, and one sentence where a user is wrong."""

import json
import os
import subprocess
import sys

import forked
import pytest
import torch
import transformers
from command_line import refuse, run
from packaging.version import Version
from safetensors.torch import load_file
from torchrun import torchrun, torchrun_on_two_nodes
from transformers import AutoModelForCausalLM

from hf_llama3.training.recipe import FSDP_SINCE, RESUME_SINCE

OPTIONS = ["--tokenizer", "char", "--layers", 2, "--hidden-size", 32, "--heads", 2, "--kv-heads", 1, "--context", 32]
OPTIONS += ["--steps", 6, "--batch-size", 4, "--eval-every", 2, "--json"]


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory):
    output = tmp_path_factory.mktemp("alone") / "out"
    return output, json.loads(run("train", "--text", text, "--output", output, *OPTIONS).stdout)


@pytest.mark.parametrize("way", [[], ["--fsdp"]], ids=["DDP", "FSDP2"])
def test_two_processes_are_as_one(way, alone, text, tmp_path):
    """Each with half of every step's windows; where Muon rounds in bfloat16, it magnifies float32's differences."""
    result = forked.torchrun("-m", "hf_llama3", "train", "--text", text, "--output", tmp_path / "out", *OPTIONS, *way)
    if way and Version(transformers.__version__) < Version(FSDP_SINCE):
        assert f"--fsdp needs transformers {FSDP_SINCE} or newer, got {transformers.__version__}" in result.stderr
        return
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)  # printed once
    for name, points in alone[1]["curves"].items():
        assert [step for step, _ in report["curves"][name]] == [step for step, _ in points]
        assert [loss for _, loss in report["curves"][name]] == pytest.approx([loss for _, loss in points], rel=1e-4)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", alone[0]))
    assert ours.keys() == theirs.keys() and all(ours[name].shape == theirs[name].shape for name in ours)
    prompt = torch.arange(20)[None]
    logits = [AutoModelForCausalLM.from_pretrained(folder)(prompt).logits for folder in (tmp_path / "out", alone[0])]
    torch.testing.assert_close(*logits, rtol=0, atol=0.02 * logits[1].abs().max().item())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(p.name for p in alone[0].iterdir())


KILL = """
import os, signal
from hf_llama3.cli.main import main
from hf_llama3.training import recipe
original = recipe.TextTrainer.training_step
def stop(self, *args, **kwargs):
    if self.state.global_step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *args, **kwargs)
recipe.TextTrainer.training_step = stop
main()
"""


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_gone_on_with_in_another_number_of_processes(before, after, alone, text, tmp_path):
    """Killed in the sixth step, gone on with from the fourth: the losses of one process throughout."""
    (tmp_path / "killed.py").write_text(KILL)
    arguments = ["train", "--text", text, "--output", tmp_path / "out", *OPTIONS]
    start = {1: forked.python, 2: forked.torchrun}
    assert start[before](tmp_path / "killed.py", *arguments).returncode
    assert (tmp_path / "out" / "run.json").exists()
    result = start[after]("-m", "hf_llama3", *arguments, "--resume")
    if after == 2 and Version(transformers.__version__) < Version(RESUME_SINCE):
        needed = f"--resume in several processes on a CPU needs transformers {RESUME_SINCE} or newer"
        assert f"{needed}, got {transformers.__version__}" in result.stderr
        return
    assert result.returncode == 0, result.stderr
    curves = json.loads(result.stdout)["curves"]
    for name, points in alone[1]["curves"].items():
        assert [loss for _, loss in curves[name]] == pytest.approx([loss for _, loss in points], rel=1e-4)


def test_two_nodes(alone, text, tmp_path):
    """Two machines, here two torchruns on one: the same losses, printed by the first."""
    arguments = ["train", "--text", text, "--output", tmp_path / "out", *OPTIONS]
    result, other_out = torchrun_on_two_nodes("-m", "hf_llama3", *arguments)
    assert result.returncode == 0, result.stderr
    curves = json.loads(result.stdout)["curves"]
    for name, points in alone[1]["curves"].items():
        assert [loss for _, loss in curves[name]] == pytest.approx([loss for _, loss in points], rel=1e-4)
    assert other_out == b""


def test_half_the_windows_give_other_losses(alone, text, tmp_path):
    """The control: the curves would not be the same if both processes saw the same half."""
    half = [2 if value == 4 else value for value in OPTIONS]
    report = json.loads(run("train", "--text", text, "--output", tmp_path / "out", *half).stdout)
    losses = [loss for _, loss in report["curves"]["training"]]
    assert losses != pytest.approx([loss for _, loss in alone[1]["curves"]["training"]], rel=1e-3)


def test_a_user_is_told_once(text, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    result = torchrun("-m", "hf_llama3", "train", "--text", text, "--output", tmp_path / "out", *OPTIONS)
    assert result.returncode and result.stderr.count("already exists; choose another --output") == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    arguments = ["train", "--text", text, "--output", tmp_path / "o", *OPTIONS, "--batch-size", 3]
    result = forked.torchrun("-m", "hf_llama3", *arguments)
    assert "must be a multiple of processes x --accumulate, got 3 and 2 x 1" in result.stderr


def test_the_one_that_speaks_is_not_cut_off(tmp_path):
    """torchrun ends all processes at the first that ends, which must not be one of those that say nothing."""
    command = [sys.executable, "-m", "hf_llama3", "inspect", str(tmp_path / "nowhere")]
    silent = subprocess.Popen(command, env=os.environ | {"RANK": "1", "LOCAL_RANK": "1"}, stderr=subprocess.PIPE)
    try:
        assert "nowhere" in run(*command[3:], code=2, RANK="0", LOCAL_RANK="0").stderr
        with pytest.raises(subprocess.TimeoutExpired):
            silent.wait(timeout=5)
    finally:
        silent.terminate()
    assert silent.communicate()[1] == b""


@pytest.mark.skipif(Version(transformers.__version__) < Version(FSDP_SINCE), reason="refused as a whole, see above")
def test_fsdp_says_what_it_cannot(text, tmp_path):
    arguments = ["train", "--text", text, "--output", tmp_path / "out", *OPTIONS, "--fsdp"]
    result = forked.torchrun("-m", "hf_llama3", *arguments, "--resume")
    assert "--resume needs the optimiser's state, which --fsdp does not keep" in result.stderr
    assert "--fsdp divides a model among processes, got 1; start it by torchrun" in refuse(*arguments)
    text = tmp_path / "odd.txt"
    text.write_text("abcd" * 2000)
    result = forked.torchrun("-m", "hf_llama3", "train", "--text", text, *arguments[3:])
    assert "--fsdp needs equal parts of the 5 tokens' rows, got 2 processes" in result.stderr, result.stderr
    assert not (tmp_path / "out").exists()
