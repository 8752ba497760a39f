"""Pipelines find our classes by the folder alone, call them supported, and answer as with upstream's."""

import pytest
import torch
import transformers
from transformers import pipeline

import hf_llama3

TEXTS = ["The cat sat on the mat.", "abcd"]
CHATS = [
    [{"role": "user", "content": "Who sat on the mat?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "And why?"}],
]
HEADS = {
    "feature-extraction": "Model",
    "text-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
}


@pytest.fixture
def log(caplog):
    """What the library logs, which by itself goes past pytest."""
    transformers.logging.enable_propagation()
    yield caplog
    transformers.logging.disable_propagation()


@pytest.mark.parametrize("inputs", [TEXTS, CHATS], ids=["texts", "chats"])
def test_generates_as_upstream(inputs, folders, log):
    answers = {}
    for kind, folder in folders.items():
        generate = pipeline("text-generation", model=str(folder))
        assert type(generate.model).__name__ == {"ours": "Llama3ForCausalLM", "upstream": "LlamaForCausalLM"}[kind]
        how = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "return_tensors": True}
        answers[kind] = generate(inputs, batch_size=2, **how)
    assert answers["ours"] == answers["upstream"]
    assert "not supported" not in log.text


@pytest.mark.parametrize("task", HEADS)
def test_scores_as_upstream(task, folders, tokenizer, tmp_path, log):
    torch.manual_seed(0)
    theirs = getattr(transformers, f"Llama{HEADS[task]}").from_pretrained(folders["upstream"])
    theirs.save_pretrained(tmp_path / "upstream")
    ours = getattr(hf_llama3, f"Llama3{HEADS[task]}").from_pretrained(tmp_path / "upstream")
    ours.save_pretrained(tmp_path / "ours")
    log.clear()  # that upstream's head is new
    answers = {}
    for kind in ("ours", "upstream"):
        tokenizer.save_pretrained(tmp_path / kind)
        score = pipeline(task, model=str(tmp_path / kind))
        assert type(score.model) is type({"ours": ours, "upstream": theirs}[kind])
        answers[kind] = score(TEXTS, batch_size=2)
    assert answers["ours"] == answers["upstream"]
    assert "not supported" not in log.text
