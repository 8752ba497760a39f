"""Several processes: the losses of one, one folder, and one sentence where a user is wrong."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from command_line import refuse, run
from packaging.version import Version
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_llama3.training.recipe import FSDP_SINCE

OPTIONS = ["--tokenizer", "char", "--layers", 2, "--hidden-size", 32, "--heads", 2, "--kv-heads", 1, "--context", 32]
OPTIONS += ["--steps", 6, "--batch-size", 4, "--eval-every", 2, "--json"]


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory):
    output = tmp_path_factory.mktemp("alone") / "out"
    return output, json.loads(run("train", "--text", text, "--output", output, *OPTIONS).stdout)


def torchrun(*arguments):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, "-m", "hf_llama3", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)


@pytest.mark.parametrize("way", [[], ["--fsdp"]], ids=["DDP", "FSDP2"])
def test_two_processes_are_as_one(way, alone, text, tmp_path):
    """Each with half of every step's windows; Muon rounds in bfloat16, which magnifies float32's differences."""
    result = torchrun("train", "--text", text, "--output", tmp_path / "out", *OPTIONS, *way)
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


def test_half_the_windows_give_other_losses(alone, text, tmp_path):
    """The control: the curves would not be the same if both processes saw the same half."""
    half = [2 if value == 4 else value for value in OPTIONS]
    report = json.loads(run("train", "--text", text, "--output", tmp_path / "out", *half).stdout)
    losses = [loss for _, loss in report["curves"]["training"]]
    assert losses != pytest.approx([loss for _, loss in alone[1]["curves"]["training"]], rel=1e-3)


def test_a_user_is_told_once(text, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    result = torchrun("train", "--text", text, "--output", tmp_path / "out", *OPTIONS)
    assert result.returncode and result.stderr.count("already exists; choose another --output") == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    result = torchrun("train", "--text", text, "--output", tmp_path / "o", *OPTIONS, "--batch-size", 3)
    assert "must be a multiple of processes x --accumulate, got 3 and 2 x 1" in result.stderr


@pytest.mark.skipif(Version(transformers.__version__) < Version(FSDP_SINCE), reason="refused as a whole, see above")
def test_fsdp_says_what_it_cannot(text, tmp_path):
    arguments = ["train", "--text", text, "--output", tmp_path / "out", *OPTIONS, "--fsdp"]
    result = torchrun(*arguments, "--resume")
    assert "--resume needs the optimiser's state, which --fsdp does not keep" in result.stderr
    assert "--fsdp divides a model among processes, got 1; start it by torchrun" in refuse(*arguments)
