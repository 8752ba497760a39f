"""GGUF files that are written, against llama.cpp's own package and transformers' own reader."""

import json
import os
import shutil
from importlib import import_module

import gguf
import numpy as np
import pytest
import torch
import transformers
from checkpoints import SMALL_VOCAB, hf_model, params, plain_folder, small_tokenizer, write_meta
from command_line import refuse, run
from gguf_files import copy_values, name_in_gguf, permuted, rope_factors, write_gguf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForSequenceClassification

from hf_llama3.conversion import convert, inspect, verify
from hf_llama3.conversion.formats.gguf import opening
from hf_llama3.conversion.opening import open_checkpoint
from hf_llama3.errors import UserError

IDS = torch.arange(5, 40)[None]
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "factor": 32.0}
LLAMA3 |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}


@pytest.fixture(scope="module")
def meta(tmp_path_factory):
    """A directory of Meta's with a small tokenizer of Llama 3's kind."""
    work = tmp_path_factory.mktemp("made")
    write_meta(work / "meta", params(vocab=SMALL_VOCAB), tokenizer=small_tokenizer(work))
    return work / "meta"


@pytest.fixture(scope="module")
def instruct(meta):
    """A Hugging Face folder of it, with all that a user may have changed in the tokenizer's files."""
    folder = meta.parent / "hf"
    convert(meta, folder, instruct=True)
    path = folder / "tokenizer_config.json"
    told = json.loads(path.read_text()) | {"padding_side": "left", "pad_token": "<|reserved_special_token_0|>"}
    path.write_text(json.dumps(told))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }} tools")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"my_key": [1, 2]}, indent=2))
    return folder


def texts(folder):
    """The small files of a folder but for those that say how it came about."""
    apart = ("provenance.json", "SHA256SUMS")
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths if path.name not in apart}


# Tensors


@pytest.mark.parametrize(
    ("dtype", "kind"), [(None, "BF16"), ("bf16", "BF16"), ("f16", "F16"), ("float32", "F32"), ("q8_0", "Q8_0")]
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_llama_cpps_package_reads_it(dtype, kind, tied, tmp_path):
    plain, model = plain_folder(tmp_path, tied=tied)
    report = convert(plain, tmp_path / "model.gguf", to="gguf", dtype=dtype)
    assert report.verification.ok and list(report.files) == ["model.gguf"]
    assert report.verification.quantised == (16 if kind == "Q8_0" else 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "plain"]
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    theirs = {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    assert found.keys() == {name_in_gguf(name) for name in theirs}
    for name, tensor in theirs.items():
        to = gguf.GGMLQuantizationType["F32" if tensor.ndim == 1 else kind]
        expected = gguf.quantize(permuted(name, tensor.float(), 8).numpy(), to)
        assert found[name_in_gguf(name)].tensor_type == to
        assert np.array_equal(found[name_in_gguf(name)].data.reshape(-1), expected.reshape(-1)), name
    for pair in ((plain, tmp_path / "model.gguf"), (tmp_path / "model.gguf", plain)):
        assert verify(*pair).ok is (dtype not in ("f16", "float32")), "another exact type is no rounding of a block"


def test_four_bits_and_rows_that_do_not_fit(tmp_path):
    plain, _ = plain_folder(tmp_path, intermediate_size=200)
    report = convert(plain, tmp_path / "model.gguf", dtype="q4_0")
    assert report.target_format == "gguf"  # by its name
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["blk.0.ffn_gate.weight"] == "Q4_0" and kinds["blk.0.ffn_down.weight"] == "F16"
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "Q8_0" and kinds["output_norm.weight"] == "F32"
    assert any("the embedding and the head are q8_0" in note for note in report.notes)
    assert any("mlp.down_proj.weight is f16: its rows of 200 are no multiple of 32" in note for note in report.notes)
    info = inspect(tmp_path / "model.gguf")
    assert "12 of q4_0, 2 of q8_0" in info.inferred[0]
    assert convert(tmp_path / "model.gguf", tmp_path / "hf", dtype="bfloat16").verification.ok
    with torch.no_grad():
        ours, theirs = (AutoModelForCausalLM.from_pretrained(one)(IDS).logits for one in (tmp_path / "hf", plain))
    assert not torch.equal(ours, theirs)
    assert torch.nn.functional.cosine_similarity(ours.float().flatten(), theirs.float().flatten(), dim=0) > 0.8


def test_transformers_own_reader_reads_it(instruct, tmp_path):
    convert(instruct, tmp_path / "model.gguf", dtype="f32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(instruct, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    text = "abcd bc <|eot_id|> x"
    begin, *ids = AutoTokenizer.from_pretrained(instruct)(text)["input_ids"]
    forgets = transformers.__version__.startswith("5.17.")  # the begin token
    assert tokenizer(text)["input_ids"] == (ids if forgets else [begin, *ids])


def test_the_factors_of_rope(tmp_path):
    plain, _ = plain_folder(tmp_path, rope_parameters=LLAMA3, head_dim=64)
    convert(plain, tmp_path / "model.gguf")
    found = copy_values(tmp_path / "model.gguf", "F32")["rope_freqs.weight"]
    assert np.allclose(found, rope_factors(32.0, 500000.0, 64), rtol=1e-5)
    assert verify(plain, tmp_path / "model.gguf", logits=True).ok


def test_linear_rope_and_biases(tmp_path):
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    plain, _ = plain_folder(tmp_path, rope_parameters=rope, head_dim=32, attention_bias=True, mlp_bias=True)
    convert(plain, tmp_path / "model.gguf", dtype="q8_0")
    assert verify(tmp_path / "model.gguf", plain).ok
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["llama.rope.scaling.type"].contents() == "linear"
    assert fields["llama.rope.scaling.factor"].contents() == 4.0


# What lies beside the tensors


def test_a_round_trip_loses_nothing(instruct, meta, tmp_path):
    convert(instruct, tmp_path / "hf", to="hf")
    convert(tmp_path / "hf", tmp_path / "model.gguf")
    convert(tmp_path / "model.gguf", tmp_path / "back")
    assert texts(tmp_path / "back") == texts(tmp_path / "hf")
    ours, theirs = (load_file(tmp_path / one / "model.safetensors") for one in ("back", "hf"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    convert(tmp_path / "hf", tmp_path / "q8.gguf", dtype="q8_0")
    convert(tmp_path / "q8.gguf", tmp_path / "wide")
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"
    convert(meta, tmp_path / "meta.gguf", instruct=True)
    convert(tmp_path / "meta.gguf", tmp_path / "meta", to="meta")
    assert (tmp_path / "meta" / "tokenizer.model").read_bytes() == (meta / "tokenizer.model").read_bytes()
    assert verify(meta, tmp_path / "meta").differences == verify(meta, tmp_path / "hf").differences


def test_the_lists_say_the_tokenizer_too(instruct, tmp_path, monkeypatch):
    """Of the carried files nothing is looked at: as llama.cpp reads it."""
    convert(instruct, tmp_path / "model.gguf")
    monkeypatch.setattr(opening, "unpack", lambda *_: None)
    convert(tmp_path / "model.gguf", tmp_path / "back")
    report = verify(instruct, tmp_path / "model.gguf")
    assert report.tokenizer == "equal"
    assert report.differences == ["`pad_token_id`: None and 262"]  # the tokenizer has one, and GGUF has one key
    ours, theirs = (AutoTokenizer.from_pretrained(one) for one in (tmp_path / "back", instruct))
    chat = [{"role": "user", "content": "abc"}]
    for template in (None, "tool_use"):
        rendered = [one.apply_chat_template(chat, chat_template=template, tokenize=False) for one in (ours, theirs)]
        assert rendered[0] == rendered[1]
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == "llama-bpe"
    assert fields["tokenizer.ggml.add_bos_token"].contents() and not fields["tokenizer.ggml.add_eos_token"].contents()
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 269
    assert fields["tokenizer.ggml.token_type"].contents()[259:261] == [1, 3]


def test_facts_that_were_changed_count(instruct, tmp_path):
    """Other tools change metadata in place; the carried files are then not of this model."""
    convert(instruct, tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf", "r+")
    reader.fields["llama.context_length"].parts[-1][0] = 4096
    del reader
    info = inspect(tmp_path / "model.gguf")
    assert info.config["max_position_embeddings"] == 4096
    assert "the Hugging Face files that the file carries" not in " ".join(info.inferred)


def test_carried_files_of_another_name(instruct, tmp_path):
    convert(instruct, tmp_path / "model.gguf")
    content = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(content.replace(b'"config.json"', b'"../fig.json"'))
    with pytest.raises(UserError, match=r"must hold files of a tokenizer, got '../fig.json'; do not trust it"):
        inspect(tmp_path / "model.gguf")


def test_a_tokenizer_that_llama_cpp_has_not(tmp_path):
    plain, _ = plain_folder(tmp_path)
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(plain / "tokenizer.json"))
    report = convert(plain, tmp_path / "model.gguf")
    assert any("llama.cpp will know token ids alone: llama.cpp has no tokenizer of the kind" in n for n in report.notes)
    convert(tmp_path / "model.gguf", tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (plain / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)], "smollm"),
        ([pre_tokenizers.ByteLevel(add_prefix_space=False)], "gpt-2"),
    ],
)
def test_other_ways_to_split(steps, name, tmp_path, monkeypatch):
    vocab = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {"ab": 256, "12": 257}
    tokenizer = Tokenizer(models.BPE(vocab, [("a", "b"), ("1", "2")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>"])
    plain, _ = plain_folder(tmp_path)
    tokenizer.save(str(plain / "tokenizer.json"))
    report = convert(plain, tmp_path / "model.gguf")
    assert not report.notes, report.notes
    assert gguf.GGUFReader(tmp_path / "model.gguf").fields["tokenizer.ggml.pre"].contents() == name
    monkeypatch.setattr(opening, "unpack", lambda *_: None)
    convert(tmp_path / "model.gguf", tmp_path / "back")
    ours = Tokenizer.from_file(str(tmp_path / "back" / "tokenizer.json"))
    assert ours.encode("ab 12<s>é").ids == tokenizer.encode("ab 12<s>é").ids
    assert ours.decode(tokenizer.encode("ab 12 é").ids) == ("ab 12 é")


# The file


def test_it_is_whole_or_not_there(tmp_path, monkeypatch):
    plain, _ = plain_folder(tmp_path)
    target = tmp_path / "model.gguf"
    convert(plain, target)
    before = target.read_bytes()
    assert "already exists; choose another target or add --overwrite" in refuse("convert", plain, target)
    weights = load_file(plain / "model.safetensors")
    save_file({name: tensor * 2 for name, tensor in weights.items()}, plain / "model.safetensors", {"format": "pt"})

    with monkeypatch.context() as patched:
        patched.setattr(import_module("hf_llama3.conversion.convert"), "open_checkpoint", stop_at_the_second())
        with pytest.raises(KeyboardInterrupt):
            convert(plain, target, overwrite=True)
    assert target.read_bytes() == before and (tmp_path / "model.gguf.partial").is_dir()
    assert "is not finished" in refuse("inspect", tmp_path / "model.gguf.partial" / "model.gguf")
    report = convert(plain, target, overwrite=True)
    assert report.resumed == ["model.gguf"] and report.verification.ok and target.read_bytes() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "plain"]


def stop_at_the_second():
    """Open a checkpoint, the first time; the second is the one that is proven."""
    opened = []

    def open_once(*arguments, **options):
        if opened:
            raise KeyboardInterrupt
        opened.append(open_checkpoint(*arguments, **options))
        return opened[0]

    return open_once


def test_what_is_no_model_is_not_replaced(tmp_path):
    plain, _ = plain_folder(tmp_path)
    (tmp_path / "model.gguf").write_text("my notes")
    sentence = refuse("convert", plain, tmp_path / "model.gguf", "--overwrite")
    assert "is no checkpoint, so it is not overwritten" in sentence
    assert (tmp_path / "model.gguf").read_text() == "my notes"
    os.remove(tmp_path / "model.gguf")
    (tmp_path / "model.gguf").mkdir()
    assert "is a folder, and a file is to stand there" in refuse("convert", plain, tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["out"], "--to gguf makes one file, so TARGET must end with .gguf, got 'out'"),
        (["out.gguf", "--mp", 1], "--mp is for another format than gguf, got 1; leave it out"),
        (["out.gguf", "--as", "llama3"], "--as is for another format than gguf, got 'llama3'; leave it out"),
        (["out.gguf", "--max-shard-size", "many"], "--max-shard-size must be a number with one of"),
        (["out.gguf", "--dtype", "q4_k"], "--dtype must be one of"),
        (
            ["out.gguf", "--dtype", "float64"],
            "--dtype must be one of ['bf16', 'f16', 'f32', 'q4_0', 'q8_0'] for",
        ),
    ],
)
def test_options_without_a_meaning(options, sentence, instruct, tmp_path):
    target, *options = options
    assert sentence in refuse("convert", instruct, tmp_path / target, "--to", "gguf", *options)
    assert not any(tmp_path.iterdir())


def test_models_that_have_no_place_in_it(tmp_path):
    yarn = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 4096}
    plain, model = plain_folder(tmp_path, rope_parameters=yarn)
    with pytest.raises(UserError, match=r"GGUF's Llama is written with plain, linear or Llama 3.1's RoPE, got .*yarn"):
        convert(plain, tmp_path / "out.gguf")
    LlamaForSequenceClassification(model.config).save_pretrained(tmp_path / "scores")
    with pytest.raises(UserError, match=r"GGUF's Llama has a place for output.weight alone; --to hf keeps it"):
        convert(tmp_path / "scores", tmp_path / "out.gguf")
    hf_model(dtype=torch.float64).save_pretrained(tmp_path / "wide")
    with pytest.raises(UserError, match=r"llama.cpp computes nothing in float64, which .* has; add --dtype f32"):
        convert(tmp_path / "wide", tmp_path / "out.gguf")
    assert convert(tmp_path / "wide", tmp_path / "out.gguf", dtype="f32").verification.ok


@pytest.mark.filterwarnings("error")
def test_weights_that_no_block_can_hold(tmp_path):
    plain, _ = plain_folder(tmp_path, dtype=torch.float32)
    weights = load_file(plain / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e8
    save_file(weights, plain / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"--dtype q8_0 cannot hold 1e\+08, which is in the weights; choose bf16"):
        convert(plain, tmp_path / "out.gguf", dtype="q8_0")
    assert not (tmp_path / "out.gguf").exists()


# Proof


def test_verify_sees_one_element(tmp_path):
    plain, model = plain_folder(tmp_path)
    convert(plain, tmp_path / "q8.gguf", dtype="q8_0")
    convert(plain, tmp_path / "exact.gguf")
    weights = load_file(plain / "model.safetensors")
    for name in ("model.layers.1.mlp.down_proj.weight", "model.layers.0.input_layernorm.weight"):
        changed = {key: tensor.clone() for key, tensor in weights.items()}
        changed[name].view(-1)[33] += 1
        model.save_pretrained(tmp_path / "other", state_dict=changed)
        for file in ("q8.gguf", "exact.gguf"):
            for pair in ((tmp_path / "other", tmp_path / file), (tmp_path / file, tmp_path / "other")):
                report = verify(*pair)
                assert not report.ok and len(report.differences) == 1, report.differences
                assert report.differences[0].startswith(f"{name}: by up to")


def test_blocks_that_cannot_be_made_again_are_said_to_differ(tmp_path):
    plain, model = plain_folder(tmp_path, hidden_size=256, intermediate_size=512)
    write_gguf(tmp_path / "model.gguf", model, "Q4_K")
    report = verify(plain, tmp_path / "model.gguf")
    assert len(report.differences) == 16 and all(": by up to " in one for one in report.differences)


def test_the_way_of_a_user(instruct, tmp_path):
    shown = run("convert", instruct, tmp_path / "q8.gguf", "--to", "gguf", "--dtype", "q8_0").stdout
    assert "21 tensors equal to the bit, of which 16 after the source was quantised again" in shown
    assert "ok" in run("verify", tmp_path / "q8.gguf", instruct).stdout
    run("convert", tmp_path / "q8.gguf", tmp_path / "meta", "--to", "meta")
    options = ("abc", "--max-new-tokens", "3", "--temperature", "0", "--json")
    one, other = (json.loads(run("generate", tmp_path / name, *options).stdout) for name in ("q8.gguf", "meta"))
    assert one == other
    report = json.loads(run("convert", instruct, tmp_path / "plan.gguf", "--dry-run", "--json").stdout)
    assert report["target_format"] == "gguf" and not (tmp_path / "plan.gguf").exists()


def test_metas_tokenizer_beside_hugging_faces_weights(tmp_path):
    """The one file travels, is read from there, and comes back."""
    write_meta(tmp_path / "meta", params(vocab=516), tokenizer=small_tokenizer(tmp_path))
    convert(tmp_path / "meta", tmp_path / "hf")
    for path in [*(tmp_path / "hf").glob("tokenizer*"), *(tmp_path / "hf").glob("special_tokens*")]:
        path.unlink()
    shutil.copy(tmp_path / "meta" / "tokenizer.model", tmp_path / "hf")
    report = convert(tmp_path / "hf", tmp_path / "model.gguf")
    assert report.verification.tokenizer == "equal" and verify(tmp_path / "meta", tmp_path / "model.gguf").ok
