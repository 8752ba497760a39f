"""Every script of examples/, run as a user does after the quickstart, on a small model where that leaves one."""

import ast
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import hf_model
from command_line import run
from peft import PeftModel
from torchrun import torchrun
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from hf_llama3.conversion import inspect, verify
from hf_llama3.quickstart import python_documentation
from hf_llama3.training.tokenizer import tiktoken_tokenizer, train_bpe

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What the quickstart leaves, of a model that knows nothing."""
    folder = tmp_path_factory.mktemp("examples") / "quickstart"
    (folder / "hf").mkdir(parents=True)
    (folder / "text.txt").write_text(python_documentation()[:20_000], "utf-8")
    tokenizer = tiktoken_tokenizer(train_bpe([python_documentation()[:20_000]], 600), context=128)
    for name, content in tokenizer.files.items():
        (folder / "hf" / name).write_bytes(content)
    hf_model(**tokenizer.vocabulary, max_position_embeddings=128, dtype=torch.float32).save_pretrained(folder / "hf")
    run("convert", folder / "hf", folder / "meta", "--mp", 2)
    run("card", folder / "hf", "--license", "apache-2.0", "--output", folder / "hf" / "README.md")
    return folder


@pytest.fixture
def example(made, monkeypatch, capsys):
    """Run an example in the folder that holds `quickstart`; returns what it printed."""

    def run_example(name, *arguments):
        monkeypatch.chdir(made.parent)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run_example


def test_load_meta_weights(example, made):
    ours = example("load_meta_weights.py")
    model, tokenizer = (auto.from_pretrained(made / "hf") for auto in (LlamaForCausalLM, AutoTokenizer))
    inputs = tokenizer("The statement", return_tensors="pt")
    theirs = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0]
    parameters = f"{model.num_parameters():,}"
    assert ours == f"Llama3ForCausalLM, {parameters} parameters, torch.float32\n{tokenizer.decode(theirs, True)}\n"


def test_convert_and_verify(example, made, tmp_path):
    printed = example("convert_and_verify.py", "quickstart/meta", tmp_path / "converted")
    assert "quickstart/meta: meta, " in printed and "2 shards" in printed and "  inferred: " in printed
    assert "converted: hf, 21 tensors compared to the bit\ntokenizer equal, logits {'tokens': 32" in printed
    assert verify(made / "hf", tmp_path / "converted").ok


def test_finetune_lora(example, made, tmp_path):
    printed = example("finetune_lora.py", "--output", tmp_path, "--learning-rate", 0.02)
    before, after = map(float, re.search(r"held out: ([\d.]+) before, ([\d.]+) after", printed).groups())
    assert after < before - 0.05  # by how much depends on Python's documentation, which is the text
    base = AutoModelForCausalLM.from_pretrained(made / "hf")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "merged")("The statement", return_tensors="pt")
    with torch.no_grad():
        plain = base(**tokens).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(**tokens).logits
        torch.testing.assert_close(merged(**tokens).logits, adapted, atol=1e-4, rtol=0)
    assert (plain - adapted).abs().max() > 0.1
    assert inspect(tmp_path / "merged").num_parameters == inspect(made / "hf").num_parameters


def test_generate_fast(example):
    printed = example("generate_fast.py", "--new-tokens", 10)
    assert re.match(r"plain: [\d.]+ tokens/s\noptimised: [\d.]+ tokens/s\nthe same tokens\nThe statement", printed)


def test_distribute(example):
    """By tensor, which divides the most: the completions of one process."""
    alone = example("distribute.py").splitlines()
    assert alone[0] == "processes: 1, divided by: None" and len(alone) == 5 and alone[1].startswith("'The statement")
    result = torchrun(EXAMPLES / "distribute.py", "--parallel", "tensor")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["processes: 2, divided by: tensor", *alone[1:]]


def test_publish(example, made):
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    printed = example("publish.py")
    assert printed.startswith("---\n") and "license: apache-2.0" in printed
    weights = (made / "hf" / "model.safetensors").stat().st_size
    assert f"{weights:>12,}  model.safetensors\n" in printed
    assert re.search(r"[\d,]+ bytes not uploaded \(--push does\) to \S+/your-name/quickstart\n$", printed)
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_every_example_is_short_says_how_to_run_it_and_is_run_here(path):
    text = path.read_text("utf-8")
    assert len(text.splitlines()) < 60
    assert f"examples/{path.name}\n" in ast.get_docstring(ast.parse(text))
    assert f'"{path.name}"' in Path(__file__).read_text("utf-8")
