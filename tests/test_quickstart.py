"""The main job from end to end, in a few steps; `.ci/run` runs all of it."""

import json
import math

import pytest
from checkpoints import real_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_llama3.quickstart as module
from hf_llama3.conversion import inspect, verify
from hf_llama3.errors import UserError


def test_quickstart(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "STEPS", 4)
    module.quickstart(tmp_path / "out")
    out = tmp_path / "out"
    printed = capsys.readouterr()

    assert inspect(out / "meta").num_shards == 2
    assert verify(out / "hf", out / "hf-again").ok and verify(out / "meta", out / "hf-again").tokenizer == "equal"
    model, tokenizer = (auto.from_pretrained(out / "hf-again") for auto in (AutoModelForCausalLM, AutoTokenizer))
    assert type(model).__name__ == "LlamaForCausalLM" and model.config.vocab_size == len(tokenizer)
    assert (out / "hf" / "README.md").read_text().startswith("---\nlicense: apache-2.0\n")
    facts = json.loads((out / "hf" / "training.json").read_text())
    assert abs(facts["first_loss"] - math.log(facts["vocab_size"])) < 0.1  # a fresh model knows nothing
    assert f"ln {facts['vocab_size']} = {math.log(facts['vocab_size']):.2f}" in printed.err
    for line in ("hf-llama3 generate", "hf-llama3 inspect", "hf-llama3 train", "2 shards", "portable folder"):
        assert line in printed.out
    with pytest.raises(UserError, match="out already exists; choose another --output"):
        module.quickstart(out)


def test_tokenizer_is_in_metas_format(tmp_path):
    """tiktoken reads the quickstart's tokenizer.model as it reads Meta's, and gives the ids of tokenizer.json."""
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe
    from tokenizers import Tokenizer

    from hf_llama3.conversion.tokenizer.bpe import PATTERN
    from hf_llama3.training.tokenizer import tiktoken_tokenizer, train_bpe

    text = module.python_documentation()
    made = tiktoken_tokenizer(train_bpe([text[:100_000]], 1000), context=64)
    files, vocabulary = made.files, made.vocabulary
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    ranks = load_tiktoken_bpe(str(tmp_path / "tokenizer.model"))
    assert len(ranks) == 1000 - 256 and vocabulary["vocab_size"] == 1000
    theirs = tiktoken.Encoding("ours", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    ours = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    held_out = text[100_000:160_000] + "Ünïcödé 你好 \U0001f999 \t\r\n  x"
    assert ours.encode(held_out, add_special_tokens=False).ids == theirs.encode(held_out)
    assert ours.decode(theirs.encode(held_out)) == held_out
    assert list(load_tiktoken_bpe(str(real_tokenizer())).values()) == list(range(128000))
