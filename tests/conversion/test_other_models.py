"""Models that the classes run and Meta's format has no place for: biases, wide heads, heads that classify."""

import json
import shutil

import pytest
import torch
from checkpoints import SMALL_VOCAB, hf_model, params, small_tokenizer, write_meta
from command_line import refuse, run
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
)

from hf_llama3 import Llama3ForCausalLM
from hf_llama3.conversion import convert, inspect, verify
from hf_llama3.conversion.load import load_checkpoint
from hf_llama3.conversion.opening import open_checkpoint
from hf_llama3.errors import UserError
from hf_llama3.model_card import build_card

BIASES = {"attention_bias": True, "mlp_bias": True}


@pytest.fixture(scope="module")
def tokenizer_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_meta(folder / "meta", params(vocab=SMALL_VOCAB), tokenizer=small_tokenizer(folder))
    convert(folder / "meta", folder / "hf")
    return [folder / "hf" / name for name in ("tokenizer.json", "tokenizer_config.json")]


def save(model, folder, tokenizer_files=()):
    model.save_pretrained(folder)
    for path in tokenizer_files:
        shutil.copy(path, folder)
    return folder


def logits(model):
    with torch.no_grad():
        return model(torch.arange(5, 40)[None]).logits


# Biases


@pytest.mark.parametrize("keys", [["attention_bias"], ["mlp_bias"], [*BIASES]], ids="-".join)
def test_biases_are_rewritten_to_the_bit(keys, tmp_path):
    model = hf_model(**dict.fromkeys(keys, True))
    folder = save(model, tmp_path / "hf")
    report = convert(folder, tmp_path / "again", to="hf", dtype="float32")
    assert report.verification.ok and report.tensors == len(load_file(folder / "model.safetensors"))
    theirs, ours = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], one.float()) for name, one in theirs.items())
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert [key for key in BIASES if config[key]] == keys
    assert inspect(folder).num_parameters == model.num_parameters()


def test_biases_in_metas_order(tmp_path):
    """Names of Meta's beside a config.json: biases of the query and key projections are reordered as their weights."""
    model = hf_model(dtype=torch.float32, **BIASES)
    folder, checkpoint = save(model, tmp_path / "hf"), open_checkpoint(tmp_path / "hf")
    meta = {}
    for row in checkpoint.rows:
        tensor = model.state_dict()[row.hf]
        if row.rotary:  # of each head's halves, neighbours
            tensor = tensor.unflatten(0, (-1, 2, 4)).transpose(1, 2).flatten(0, 2)
        meta[row.meta] = tensor.contiguous()
    shutil.copytree(folder, tmp_path / "meta-names")
    save_file(meta, tmp_path / "meta-names" / "model.safetensors")
    report = verify(folder, tmp_path / "meta-names", logits=True)
    assert report.ok, report.differences
    assert torch.equal(logits(load_checkpoint(open_checkpoint(tmp_path / "meta-names"))), logits(model))


def test_logits_of_biases_are_those_of_the_class(tmp_path):
    from hf_llama3.conversion.logits import NUM_TOKENS, compute_logits

    model = hf_model(dtype=torch.float32, **BIASES)
    checkpoint = open_checkpoint(save(model, tmp_path / "hf"))
    ids = torch.tensor([[(1 + 7919 * index) % 512 for index in range(NUM_TOKENS)]])
    positions = torch.linspace(0, model.config.max_position_embeddings - 1, NUM_TOKENS).long()[None]
    with torch.no_grad():
        theirs = model(ids, position_ids=positions).logits[0]
    ours = compute_logits(checkpoint, lambda count: None)
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()  # float32 sums in another order


def test_a_bias_that_only_one_side_has(tmp_path):
    save(hf_model(), tmp_path / "plain")
    save(hf_model(**BIASES), tmp_path / "biased")
    report = verify(tmp_path / "plain", tmp_path / "biased")
    assert not report.ok and any(one.endswith("down_proj.bias: only in target") for one in report.differences)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (BIASES, "has biases in its projections: .* params.json no key for `attention_bias`; --to hf keeps it"),
        ({"mlp_bias": True}, "no key for `mlp_bias`"),
        ({"head_dim": 16}, "since params.json has no key for `head_dim`, got 16 x 8 and 64; --to hf keeps it"),
    ],
)
def test_what_meta_has_no_place_for(changes, message, tmp_path):
    folder = save(hf_model(**changes), tmp_path / "hf")
    for dry_run in (True, False):
        with pytest.raises(UserError, match=message):
            convert(folder, tmp_path / "meta", dry_run=dry_run)
    assert convert(folder, tmp_path / "again", to="hf").verification.ok


def test_packed_biases(tmp_path):
    from hf_llama3.cpu.packing import pack_model

    pack_model(save(hf_model(**BIASES), tmp_path / "hf"), tmp_path / "packed")
    ours, theirs = (logits(AutoModelForCausalLM.from_pretrained(tmp_path / name)).float() for name in ("packed", "hf"))
    # A product is rounded to bfloat16 once more before its bias is added; without the biases it is beyond 1
    assert (ours - theirs).abs().max() < 4e-2 * theirs.abs().max()


# Heads whose width together is not that of the model


def test_wide_heads_whose_number_does_not_divide_the_width(tokenizer_files, tmp_path):
    """transformers' own class refuses such a configuration, although `head_dim` says it all; ours runs it."""
    model = hf_model(heads=8, kv_heads=2, head_dim=16, vocab_size=SMALL_VOCAB)
    folder = save(model, tmp_path / "hf", tokenizer_files)
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():  # six heads of the eight
        if "q_proj" in name:
            weights[name] = tensor[:96].clone()
        elif "o_proj" in name:
            weights[name] = tensor[:, :96].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 6}))
    with pytest.raises(Exception, match="not a multiple of the number of attention"):
        AutoModelForCausalLM.from_pretrained(folder)
    ours = Llama3ForCausalLM.from_pretrained(folder)
    assert ours.config.num_attention_heads == 6 and ours.config.num_key_value_heads == 2
    assert torch.equal(logits(load_checkpoint(open_checkpoint(folder))), logits(ours))
    assert json.loads(run("generate", folder, "abc", "--max-new-tokens", "2", "--json").stdout)
    assert convert(folder, tmp_path / "again", to="hf").verification.ok


# Heads that classify


HEADS = {
    "ForSequenceClassification": (LlamaForSequenceClassification, "text-classification"),
    "ForTokenClassification": (LlamaForTokenClassification, "token-classification"),
    "ForQuestionAnswering": (LlamaForQuestionAnswering, "question-answering"),
    "Model": (LlamaModel, "feature-extraction"),
}


@pytest.fixture(params=HEADS)
def classifier(request, tokenizer_files, tmp_path):
    labels = {"num_labels": 3} if "Classification" in request.param else {}
    config = LlamaConfig(
        **{**hf_model(vocab_size=SMALL_VOCAB).config.to_dict(), "id2label": None, "label2id": None, **labels}
    )
    config.id2label |= {0: "bad"} if labels else {}
    torch.manual_seed(0)
    model = HEADS[request.param][0](config)
    return request.param, model, save(model, tmp_path / "hf", tokenizer_files)


def test_a_model_that_writes_no_text(classifier, tmp_path):
    head, model, folder = classifier
    info = inspect(folder)
    assert info.head == head and info.num_parameters == model.num_parameters()
    card = build_card(folder, "mit")
    assert f"pipeline_tag: {HEADS[head][1]}" in card and f"= AutoModel{head.removeprefix('Model')}.from_pretr" in card
    assert "AutoModelForCausalLM" not in card and "vllm" not in card

    sentence = refuse("generate", folder, "abc")
    assert (
        f"is a Llama{head}, which " in sentence and f"load it by AutoModel{head.removeprefix('Model')}.from" in sentence
    )
    for command in (["evaluate", folder, "--text", __file__], ["pack", folder, tmp_path / "packed"]):
        assert "writes no text" in refuse(*command)
    assert "Meta's format has a place for output.weight alone; --to hf keeps it" in refuse(
        "convert", folder, tmp_path / "meta"
    )


def test_a_classifier_is_rewritten(classifier, tmp_path):
    head, model, folder = classifier
    report = convert(folder, tmp_path / "again", to="hf")
    assert report.verification.ok and verify(folder, tmp_path / "again", logits=True).ok
    theirs, ours = load_file(folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["architectures"] == [f"Llama{head}"]
    if "Classification" in head:
        assert config["id2label"] == {"0": "bad", "1": "LABEL_1", "2": "LABEL_2"}
    ours = HEADS[head][0].from_pretrained(tmp_path / "again")
    assert ours.state_dict().keys() == model.state_dict().keys()


def test_a_classifier_is_ready_to_be_pushed(classifier):
    _, _, folder = classifier
    out = json.loads(run("push", folder, "me/judge", "--license", "mit", "--dry-run", "--json").stdout)
    assert "model.safetensors" in out["files"]
    assert AutoModel.from_pretrained(folder) is not None


def test_a_head_of_another_width(tmp_path):
    folder = save(LlamaForSequenceClassification(LlamaConfig(**hf_model().config.to_dict())), tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    labels = {"id2label": {str(index): str(index) for index in range(5)}}
    (folder / "config.json").write_text(json.dumps(config | labels))
    with pytest.raises(UserError, match=r"config.json makes score.weight \[5, 64\], but it is \[2, 64\]"):
        inspect(folder)
    (folder / "config.json").write_text(json.dumps(config | {"id2label": [1]}))
    with pytest.raises(UserError, match=r"`id2label` in .* must map numbers to labels, got \[1\]"):
        inspect(folder)
