"""`hf-llama3 doctor`: what it finds here, and what it says where something is missing."""

import json
import re
import sys
from importlib import metadata

import torch
from command_line import run
from huggingface_hub import constants

from hf_llama3.cpu import processor
from hf_llama3.doctor import EXTRAS

METADATA = """\
Metadata-Version: 2.4
Name: hf_llama3
Version: 7.8.9
Requires-Dist: filelock
Requires-Dist: no_such_package>=1.2
Requires-Dist: torch>=99
Requires-Dist: transformers<5
Requires-Dist: not_for_this_machine; sys_platform == "none"
Requires-Dist: matplotlib>=99; extra == "plot"
Requires-Dist: no_such_package; extra == "peft"
Requires-Dist: gguf>=99; extra == "gguf"
Requires-Dist: sentencepiece; extra == "llama2"
"""


def lines(table):
    """Return the two columns of a table by the first."""
    return dict(re.split(" {2,}", line, maxsplit=1) for line in table.splitlines() if "  " in line)


def test_what_is_here():
    """With the versions that the installed packages say, and the devices that torch counts."""
    found = json.loads(run("doctor", "--json").stdout)
    assert found["ok"] and found["problems"] == [] and all(found["extras"].values())
    for name in ("torch", "transformers", "huggingface_hub", "accelerate", "safetensors", "tokenizers", "hf_llama3"):
        assert found["versions"][name] == metadata.version(name)
    assert found["versions"].keys() == {"Python", "hf_llama3", *found["required"]}
    assert found["required"]["torch"].startswith(">=") and len(found["devices"]) == torch.accelerator.device_count()
    cpu = found["cpu"]
    assert cpu["threads"] == torch.get_num_threads() and cpu["instructions"] == list(processor.here().instructions)
    for room in (found["memory"], *found["disk"].values(), *found["devices"]):
        assert 0 < room["free"] < room["total"]
    printed = run("doctor").stdout
    table = lines(printed)
    assert table["torch"] == f"{metadata.version('torch')} (needed: {found['required']['torch']})"
    assert table["extra plot"].startswith("installed (pictures") and "Problem" not in printed
    assert table["CPU"] == f"{cpu['name']}, {cpu['cores']} cores, threads of torch: {cpu['threads']}"
    assert cpu["name"] == processor.here().name and cpu["cores"] == processor.cores()


def test_what_is_missing(tmp_path, monkeypatch):
    """By the package's own metadata: here a copy that asks for more."""
    (tmp_path / "hf_llama3-7.8.9.dist-info").mkdir()
    (tmp_path / "hf_llama3-7.8.9.dist-info" / "METADATA").write_text(METADATA)
    monkeypatch.syspath_prepend(tmp_path)
    found = json.loads(run("doctor", "--json", code=1).stdout)
    installed = {name: metadata.version(name) for name in ("torch", "transformers")}
    assert not found["ok"] and found["problems"] == [
        'no_such_package is missing; pip install "no_such_package>=1.2"',
        f'torch must be >=99, got {installed["torch"]}; pip install "torch>=99"',
        f'transformers must be <5, got {installed["transformers"]}; pip install "transformers<5"',
    ]
    assert found["extras"] == {"plot": False, "gguf": False, "llama2": True, "peft": False}
    table = run("doctor", code=1).stdout
    assert lines(table)["no-such-package"] == "missing (needed: >=1.2)" and "not-for-this-machine" not in table
    for extra in ("plot", "gguf", "peft"):
        assert f'Optional: for {EXTRAS[extra]}, pip install "hf_llama3[{extra}]"\n' in table
    assert table.endswith(f"Problem: {found['problems'][-1]}\n")


def test_torch_that_cannot_be_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it raises
    result = run("doctor", code=1)
    assert "Problem: torch cannot be imported (import of torch halted" in result.stdout
    assert f"{processor.name_here()}, {processor.cores()} cores, threads of torch: unknown" in result.stdout
    assert lines(result.stdout)["instructions"] == "unknown"


def test_extras_are_those_of_the_package():
    assert set(EXTRAS) <= set(metadata.metadata("hf_llama3").get_all("Provides-Extra"))


def test_no_secret_is_told(tmp_path, monkeypatch):
    """Neither the token nor what stands before the Hub's name; the cache need not be there yet."""
    monkeypatch.setenv("HF_TOKEN", "hf_s3cr3t")
    monkeypatch.setattr(constants, "ENDPOINT", "https://me:s3cr3t@hub.example:8443")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "not" / "yet"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    table, document = run("doctor").stdout, run("doctor", "--json").stdout
    assert "s3cr3t" not in table + document
    assert lines(table)["Hub"] == "https://hub.example:8443, offline (HF_HUB_OFFLINE), a token"
    found = json.loads(document)
    assert found["hub"] == {"endpoint": "https://hub.example:8443", "offline": True, "token": True}
    assert found["disk"]["hub_cache"]["path"] == str(tmp_path / "not" / "yet") and found["disk"]["hub_cache"]["free"]
    assert not (tmp_path / "not").exists()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert lines(run("doctor").stdout)["Hub"].endswith(", no token")
    (tmp_path / "token").write_text("hf_s3cr3t")
    assert lines(run("doctor").stdout)["Hub"].endswith(", a token")
