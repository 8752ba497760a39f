"""The classification and question-answering heads against upstream's, with the same weights."""

import pytest
import torch
import transformers
from parity import GEOMETRY, same, tokens

import hf_llama3

LABELS = {
    "ForSequenceClassification": {"labels": torch.tensor([0, 2])},
    "ForTokenClassification": {"labels": tokens() % 3},
    "ForQuestionAnswering": {"start_positions": torch.tensor([1, 4]), "end_positions": torch.tensor([9, 30])},
}


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_equal_to_upstream(name, padding):
    torch.manual_seed(0)
    theirs = getattr(transformers, f"Llama{name}")(transformers.LlamaConfig(**GEOMETRY, num_labels=3)).eval()
    ours = getattr(hf_llama3, f"Llama3{name}")(hf_llama3.Llama3Config(**GEOMETRY, num_labels=3)).eval()
    ours.load_state_dict(theirs.state_dict())
    inputs = {"input_ids": tokens().clone()}
    if padding:
        inputs["attention_mask"] = torch.ones_like(tokens())
        hidden = slice(0, 7) if padding == "left" else slice(-7, None)
        inputs["input_ids"][0, hidden] = GEOMETRY["pad_token_id"]
        inputs["attention_mask"][0, hidden] = 0
    mine, other = ours(**inputs, **LABELS[name]), theirs(**inputs, **LABELS[name])
    assert mine.keys() == other.keys()
    for key in ("loss", "logits", "start_logits", "end_logits"):
        if key in mine:
            same(mine[key], other[key])


@pytest.mark.parametrize("rates", [{}, {"classifier_dropout": 0.0}, {"hidden_dropout": 0.3}])
def test_dropout_before_the_classifier(rates, recwarn):
    theirs = transformers.LlamaForTokenClassification(transformers.LlamaConfig(**GEOMETRY, **rates))
    ours = hf_llama3.Llama3ForTokenClassification(hf_llama3.Llama3Config(**GEOMETRY, **rates))
    assert ours.dropout.p == theirs.dropout.p
    assert not [warning for warning in recwarn if "not a field" in str(warning.message)]


@pytest.mark.parametrize("name", ["Model", "ForCausalLM", *LABELS])
def test_loads_upstream_checkpoints(name, tmp_path):
    """Upstream's files, of type llama, fit every class to the name."""
    theirs = getattr(transformers, f"Llama{name}")(transformers.LlamaConfig(**GEOMETRY)).eval()
    theirs.save_pretrained(tmp_path)
    ours, info = getattr(hf_llama3, f"Llama3{name}").from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert ours.config.model_type == "llama3"
    ours.save_pretrained(tmp_path / "again")
    again = transformers.AutoConfig.from_pretrained(tmp_path / "again")
    assert type(again) is hf_llama3.Llama3Config
