"""What quickstart, convert and train make goes to a Hub and comes back where this package has never been."""

import os
import subprocess
import sys

import pytest
import torch
from checkpoints import params, small_tokenizer, write_meta
from command_line import run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_llama3.quickstart as quickstart
from hf_llama3.conversion import convert

COME_BACK = """
import sys
sys.modules["hf_llama3"] = None  # to import it raises
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
import torch
tokens, logits = torch.arange(3, 35)[None], {}
for name in ("quickstart", "converted", "own", "trained"):
    trust = {"trust_remote_code": True} if name == "own" else {}
    AutoTokenizer.from_pretrained(f"lab/back-{name}", **trust)("abc")
    logits[name] = AutoModelForCausalLM.from_pretrained(f"lab/back-{name}", **trust)(tokens).logits.detach()
for kind in ("Model", "ModelForSequenceClassification", "ModelForTokenClassification", "ModelForQuestionAnswering"):
    loaded = getattr(transformers, f"Auto{kind}").from_pretrained("lab/back-own", trust_remote_code=True)
    assert type(loaded).__name__ == AutoConfig.from_pretrained(
        "lab/back-own", trust_remote_code=True
    ).auto_map[f"Auto{kind}"].split(".")[1].split("--")[-1], type(loaded)
save_file(logits, sys.argv[1])
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("back")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart, "STEPS", 3)
        quickstart.quickstart(root / "quickstart")
    write_meta(root / "meta", params(vocab=516), mp=2, tokenizer=small_tokenizer(root))
    convert(root / "meta", root / "converted")
    convert(root / "meta", root / "own", model_type="llama3", instruct=True)
    (root / "text.txt").write_text("abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789.\n" * 50)
    shape = ["--layers", 2, "--hidden-size", 32, "--heads", 2, "--kv-heads", 1, "--context", 32]
    train = ["train", "--text", root / "text.txt", "--output", root / "trained", "--tokenizer", "char", *shape]
    run(*train, "--steps", 3, "--batch-size", 2, "--license", "mit")
    return {name: root / name for name in ("converted", "own", "trained")} | {"quickstart": root / "quickstart" / "hf"}


def test_come_back(hub, client, folders, tmp_path):
    for name, folder in folders.items():
        license = ["--license", "mit"] if name in ("converted", "own") else []
        client.run("push", folder, f"lab/back-{name}", *license)
    environment = os.environ | hub.environment(tmp_path / "home", token=None)
    command = [sys.executable, "-c", COME_BACK, tmp_path / "logits"]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    came, tokens = load_file(tmp_path / "logits"), torch.arange(3, 35)[None]
    for name, folder in folders.items():
        ours = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits.detach()
        assert torch.equal(came[name], ours) and ours.std() > 0
