"""What a verification sees: a bit, a setting, a token, and what the numbers mean to a model."""

import json
import shutil

import pytest
import torch
from checkpoints import SMALL_VOCAB, hf_model, params, small_tokenizer, write_meta
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from hf_llama3.conversion import convert, verify
from hf_llama3.conversion.logits import NUM_TOKENS, compute_logits
from hf_llama3.conversion.opening import open_checkpoint
from hf_llama3.presets import llama3_scaling


@pytest.fixture
def pair(tmp_path):
    """A directory of Meta's with a tokenizer, two shards, and what it was converted to."""
    layout = params(vocab=SMALL_VOCAB, use_scaled_rope=True)
    write_meta(tmp_path / "meta", layout, mp=2, tokenizer=small_tokenizer(tmp_path))
    convert(tmp_path / "meta", tmp_path / "hf", rope_factor=8)
    return tmp_path / "meta", tmp_path / "hf"


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def test_one_bit(pair):
    meta, hf = pair
    name = "model.layers.1.self_attn.q_proj.weight"

    def flip(weights):
        weights[name].view(torch.int16)[5, 7] ^= -(2**15)  # the sign

    before = load_file(hf / "model.safetensors")[name][5, 7].item()
    edit_weights(hf, flip)
    report = verify(meta, hf)
    assert not report.ok and report.differences == [f"{name}: by up to {2 * abs(before):.3g}"]
    assert report.largest_difference == 2 * abs(before)


def test_bits_that_mean_the_same_number(pair):
    meta, hf = pair

    def zero(sign):
        def change(weights):
            weights["model.norm.weight"][3] = sign * 0.0

        return change

    edit_weights(hf, zero(1))
    convert(hf, meta.with_name("zero"))
    edit_weights(hf, zero(-1))
    assert verify(meta.with_name("zero"), hf).differences == ["model.norm.weight: by up to 0"]


def test_another_configuration(pair):
    meta, hf = pair
    raw = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(raw | {"rms_norm_eps": 1e-6}))
    assert verify(meta, hf).differences == ["`rms_norm_eps`: 1e-05 and 1e-06"]


def test_another_geometry(pair, tmp_path):
    hf_model().save_pretrained(tmp_path / "other")
    assert f"`vocab_size`: {SMALL_VOCAB} and 512" in verify(pair[1], tmp_path / "other").differences


def rename_token(raw):
    raw["added_tokens"][40]["content"] = "<|mine|>"


def swap_tokens(raw):
    vocab = raw["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


def other_pattern(raw):
    raw["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "b|[^b]+"


def fewer_merges(raw):
    raw["model"]["merges"].pop()
    raw["model"]["ignore_merges"] = False


@pytest.mark.parametrize("damage", [rename_token, swap_tokens, other_pattern, fewer_merges])
def test_another_tokenizer(damage, pair):
    meta, hf = pair
    raw = json.loads((hf / "tokenizer.json").read_text())
    damage(raw)
    (hf / "tokenizer.json").write_text(json.dumps(raw))
    report = verify(meta, hf)
    assert report.tokenizer == "differs" and len(report.differences) == 1
    assert report.differences[0].startswith("the tokenizer: ")


def test_a_begin_token_that_is_none(pair, tmp_path):
    """`bos_token_id` 1, as upstream's configuration has it where nobody says: no special token has that id."""
    raw = json.loads((pair[1] / "config.json").read_text())
    (pair[1] / "config.json").write_text(json.dumps(raw | {"bos_token_id": 1}))
    assert convert(pair[1], tmp_path / "meta2").verification.tokenizer == "equal"


def test_what_a_tokenizer_was_last_asked(pair):
    """Cutting and padding, which a saved tokenizer remembers, are no difference."""
    meta, hf = pair
    raw = json.loads((hf / "tokenizer.json").read_text())
    raw["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    (hf / "tokenizer.json").write_text(json.dumps(raw))
    assert verify(meta, hf).tokenizer == "equal"


def test_the_same_tokenizer_in_another_spelling(pair):
    """Not the bytes of tokenizer.json count, but what it does."""
    meta, hf = pair
    raw = json.loads((hf / "tokenizer.json").read_text())
    (hf / "tokenizer.json").write_text(json.dumps(raw, indent=7))
    report = verify(meta, hf)
    assert report.ok and report.tokenizer == "equal"


@pytest.mark.parametrize(
    ("left", "answer"), [((), "absent"), (("meta",), "only in source"), (("hf",), "only in target")]
)
def test_no_tokenizer(left, answer, pair):
    meta, hf = pair
    if "meta" not in left:
        (meta / "tokenizer.model").unlink()
    if "hf" not in left:
        (hf / "tokenizer.json").unlink()
    report = verify(meta, hf)
    assert report.tokenizer == answer
    alone = answer.removeprefix("only in ")
    said = [] if answer == "absent" else [f"weights only: there is a tokenizer in the {alone} alone"]
    assert [line for line in report.differences if "tokenizer" in line] == said
    assert not (said and report.ok)


@pytest.mark.parametrize("mp", [1, 2])
def test_logits(mp, tmp_path):
    """Computed from the files, they are upstream's own, at positions up to the end of a scaled context."""
    rope = {"rope_theta": 500000.0} | llama3_scaling(8.0)
    model = hf_model(max_position_embeddings=131072, rope_parameters=rope)
    model.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "meta", mp=mp)
    report = verify(tmp_path / "hf", tmp_path / "meta", logits=True)
    assert report.ok and report.logits["tokens"] == NUM_TOKENS
    assert report.logits["largest_difference"] <= 2e-5 * report.logits["largest_logit"]

    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    ids = torch.tensor([[(1 + 7919 * index) % 512 for index in range(NUM_TOKENS)]])
    positions = torch.linspace(0, 131071, NUM_TOKENS).long()[None]
    expected = theirs(ids, position_ids=positions, attention_mask=torch.ones_like(ids)).logits[0]
    for form in ("hf", "meta"):
        ours = compute_logits(open_checkpoint(tmp_path / form), lambda count: None)
        torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"eos_token_id": 5}, "generation_config.json, 'eos_token_id': "),
        ({"stop_strings": ["x"]}, "generation_config.json, 'stop_strings': None and ['x']"),
        ({"transformers_version": "4.0.0"}, None),
    ],
)
def test_settings_of_generation(change, said, pair, tmp_path):
    """A model that stops at another token is another one to its user."""
    shutil.copytree(pair[1], tmp_path / "other")
    path = tmp_path / "other" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    found = verify(pair[1], tmp_path / "other").differences
    assert [one.startswith(said) for one in found] == [True] if said else found == []


def test_logits_of_llama_2(tmp_path):
    """Shards that divide the embedding's channels."""
    write_meta(tmp_path / "meta", params(vocab=32000, rope_theta=10000.0), mp=2, embedding_dim=1)
    convert(tmp_path / "meta", tmp_path / "hf")
    report = verify(tmp_path / "meta", tmp_path / "hf", logits=True)
    assert report.ok and report.logits["largest_logit"] > 1


def test_logits_see_the_order_of_the_rows(pair):
    """The control: equal numbers in the wrong order for the format are another model."""
    meta, hf = pair

    def interleave(weights):
        name = "model.layers.0.self_attn.q_proj.weight"
        weights[name] = weights[name].view(8, 2, 4, 64).transpose(1, 2).reshape(64, 64).contiguous()

    edit_weights(hf, interleave)
    report = verify(meta, hf, logits=True)
    assert len(report.differences) == 2 and report.differences[1].startswith("logits: by up to")
    assert report.logits["largest_difference"] > 1e-2 * report.logits["largest_logit"]
