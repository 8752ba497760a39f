"""Every way in which Meta's and Hugging Face's checkpoints lie about, recognised without a flag."""

import hashlib
import json
import shutil

import pytest
import torch
from checkpoints import SMALL_VOCAB, hf_model, meta_tensors, params, shard, small_tokenizer, write_meta
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_llama3.conversion import convert, inspect, load_meta, verify
from hf_llama3.conversion.config.params import config_to_params
from hf_llama3.conversion.formats.meta import fold_repeated_heads
from hf_llama3.conversion.formats.pth import PthLayout
from hf_llama3.conversion.formats.storage import BY_NAME, write_all
from hf_llama3.conversion.opening import open_checkpoint
from hf_llama3.conversion.weights import rows, sizes
from hf_llama3.errors import UserError
from hf_llama3.presets import config_of


def same_model(folder, tensors, tmp_path):
    """The folder converts to what Meta's tensors are, whole."""
    convert(folder, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "back", to="meta")
    written = torch.load(tmp_path / "back" / "consolidated.00.pth", weights_only=True)
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensors[name]) for name in tensors)


def test_an_instruct_model_must_be_named(tmp_path):
    """No file of Meta's tells it from its base: what that costs is said, unless the user has said which it is."""
    write_meta(tmp_path / "meta", params(vocab=SMALL_VOCAB), tokenizer=small_tokenizer(tmp_path))
    for number, (given, said) in enumerate([(None, True), (False, False), (True, False)]):
        report = convert(tmp_path / "meta", tmp_path / f"hf-{number}", instruct=given)
        lines = [line for line in report.inferred if "--instruct" in line]
        assert len(lines) == said and all("no chat template and does not stop" in line for line in lines)
        assert (tmp_path / f"hf-{number}" / "chat_template.jinja").exists() == bool(given)


def test_numbers_without_a_zero(tmp_path):
    """Eleven shards and more, where the order of the names is not that of the numbers."""
    tensors = write_meta(
        tmp_path / "meta",
        params(192, heads=12, kv_heads=12, vocab=516, ffn_dim_multiplier=None, multiple_of=48),
        12,
        ffn=528,
    )
    for index in range(12):
        (tmp_path / "meta" / f"consolidated.{index:02d}.pth").rename(tmp_path / "meta" / f"consolidated.{index}.pth")
    assert inspect(tmp_path / "meta").num_shards == 12
    same_model(tmp_path / "meta", tensors, tmp_path)


@pytest.mark.parametrize("name", ["model.pth", "consolidated.pth", "llama-3-8b.pth"])
def test_a_single_renamed_shard(name, tmp_path):
    tensors = write_meta(tmp_path / "meta", params())
    (tmp_path / "meta" / "consolidated.00.pth").rename(tmp_path / "meta" / name)
    same_model(tmp_path / "meta", tensors, tmp_path)


def test_several_renamed_shards_are_not_guessed(tmp_path):
    write_meta(tmp_path / "meta", params(), mp=2)
    for index in range(2):
        (tmp_path / "meta" / f"consolidated.0{index}.pth").rename(tmp_path / "meta" / f"part{index}.pth")
    with pytest.raises(UserError, match=r"part0.pth, part1.pth, which .* name them consolidated.00.pth, consol"):
        inspect(tmp_path / "meta")


def test_original_inside_a_snapshot(tmp_path):
    """A copy from the Hub: Hugging Face's files beside Meta's, or Meta's alone."""
    tensors = write_meta(tmp_path / "snapshot" / "original", params(), mp=2)
    assert inspect(tmp_path / "snapshot").path.endswith("original")
    same_model(tmp_path / "snapshot", tensors, tmp_path)
    for path in (tmp_path / "hf").iterdir():
        shutil.copy(path, tmp_path / "snapshot")
    assert inspect(tmp_path / "snapshot").format == "hf"
    assert inspect(tmp_path / "snapshot" / "original").format == "meta"
    assert load_meta(tmp_path / "snapshot" / "original").dtype == torch.bfloat16


def test_shards_in_parts(tmp_path):
    """The Hub's 405B: a folder for each shard, with some of its tensors in each file."""
    tensors = meta_tensors(params())
    for rank, weights in enumerate(shard(tensors, 2)):
        folder = tmp_path / "meta" / f"consolidated.{rank:02d}"
        folder.mkdir(parents=True)
        names = sorted(weights)
        for part in range(3):
            chosen = {name: weights[name] for name in names[part::3]}
            torch.save(chosen, folder / f"consolidated-{part + 1:05d}-of-00003.pth")
    (tmp_path / "meta" / "params.json").write_text(json.dumps(params()))
    assert inspect(tmp_path / "meta").num_shards == 2
    same_model(tmp_path / "meta", tensors, tmp_path)

    part = tmp_path / "meta" / "consolidated.01" / "consolidated-00002-of-00003.pth"
    shutil.copy(part, part.with_name("copy.pth"))
    with pytest.raises(UserError, match="which another part holds as well"):
        inspect(tmp_path / "meta")
    part.with_name("copy.pth").unlink()
    part.unlink()
    with pytest.raises(UserError, match="must hold the same tensors"):
        inspect(tmp_path / "meta")


@pytest.mark.parametrize("mp", [1, 2])
def test_safetensors_under_metas_names(mp, tmp_path):
    tensors = meta_tensors(params())
    (tmp_path / "meta").mkdir()
    for rank, weights in enumerate(shard(tensors, mp)):
        name = "consolidated.safetensors" if mp == 1 else f"consolidated.{rank:02d}.safetensors"
        save_file(weights, tmp_path / "meta" / name)
    (tmp_path / "meta" / "params.json").write_text(json.dumps(params()))
    same_model(tmp_path / "meta", tensors, tmp_path)


def test_the_same_shard_twice(tmp_path):
    write_meta(tmp_path / "meta", params())
    save_file(meta_tensors(params()), tmp_path / "meta" / "consolidated.safetensors")
    with pytest.raises(UserError, match=r"holds shard 0 twice: .* remove one"):
        inspect(tmp_path / "meta")


def test_output_left_out_of_a_tied_checkpoint(tmp_path):
    tensors = meta_tensors(params(), tied=True)
    (tmp_path / "meta").mkdir()
    torch.save({n: t for n, t in tensors.items() if n != "output.weight"}, tmp_path / "meta" / "consolidated.00.pth")
    (tmp_path / "meta" / "params.json").write_text(json.dumps(params()))
    assert inspect(tmp_path / "meta").tied
    same_model(tmp_path / "meta", tensors, tmp_path)


def test_sixteen_shards_with_every_head_twice(tmp_path):
    """Meta's 405B-MP16, whose params.json counts 16 key/value heads for 8."""
    layout = params(dim=256, heads=16, kv_heads=8, ffn_dim_multiplier=None)
    tensors = meta_tensors(layout, ffn=704)
    head = layout["dim"] // layout["n_heads"]
    for layer in range(2):
        for name in ("wk", "wv"):
            key = f"layers.{layer}.attention.{name}.weight"
            tensors[key] = tensors[key].view(8, head, -1).repeat_interleave(2, dim=0).reshape(16 * head, -1)
    (tmp_path / "meta").mkdir()
    for rank, weights in enumerate(shard(tensors, 16)):
        torch.save(weights, tmp_path / "meta" / f"consolidated.{rank:02d}.pth")
    (tmp_path / "meta" / "params.json").write_text(json.dumps(layout | {"n_kv_heads": 16}))
    info = inspect(tmp_path / "meta")
    assert info.config["num_key_value_heads"] == 8
    assert "8 key/value heads: each is stored 2 times" in info.inferred
    convert(tmp_path / "meta", tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["num_key_value_heads"] == 8
    convert(tmp_path / "hf", tmp_path / "again", mp=16)
    for rank, weights in enumerate(shard(tensors, 16)):
        again = torch.load(tmp_path / "again" / f"consolidated.{rank:02d}.pth", weights_only=True)
        assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_heads_that_are_equal_by_nature_stay(tmp_path):
    """Where this package wrote the shards, it kept how many heads there are: equal ones are not taken for copies."""
    model = hf_model(heads=4, kv_heads=4)
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                projection.weight.copy_(projection.weight[:16].repeat(4, 1))
    model.save_pretrained(tmp_path / "hf")
    assert convert(tmp_path / "hf", tmp_path / "meta", mp=4).verification.ok
    assert inspect(tmp_path / "meta").config["num_key_value_heads"] == 4


def sparse_checkpoint(folder, name, mp, kv_heads, **others):
    """The files of a released model at full size, with holes where the weights would be."""
    folder.mkdir()
    config = config_of(name) | {"rms_norm_eps": 1e-5} | others
    config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    size = sizes(config) | {"key_value": kv_heads * config["head_dim"]}
    for rank in range(mp):
        tensors = []
        for row in rows(config["num_hidden_layers"]):
            shape = list(row.full_shape(size))
            if row.split is not None:
                shape[row.split] //= mp
            tensors.append((row.meta, BY_NAME["bfloat16"], tuple(shape)))
        layout = PthLayout(f"consolidated.{rank:02d}", tensors)
        with open(folder / f"consolidated.{rank:02d}.pth", "wb", buffering=0) as out:
            out.truncate(layout.size)
            for offset, content in layout.fixed([0] * len(tensors)):
                write_all(out, content, offset)
            # What decides: heads come in pairs, and the output head is not the embedding.
            names = [name for name, _, _ in tensors]
            for name in ("layers.0.attention.wk.weight", "layers.0.attention.wv.weight", "output.weight"):
                write_all(out, bytes([rank // 2 + 1]), layout.offsets[names.index(name)])
    (folder / "params.json").write_text(json.dumps(config_to_params(config, folder, kv_heads)))
    return folder


def test_405b_in_sixteen_shards_is_planned(tmp_path, monkeypatch):
    """810 GB of holes: planned from where the tensors lie, without reading one but to see that heads are copies."""
    source = sparse_checkpoint(tmp_path / "meta", "3.1-405B", 16, kv_heads=16)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10**13}))
    report = convert(source, tmp_path / "hf", dry_run=True)
    assert report.tensors == 126 * 9 + 3 and report.bytes > 811 * 10**9
    assert "8 key/value heads: each is stored 2 times" in report.inferred
    assert len(report.files) > 170 and report.seconds < 60
    back = convert(source, tmp_path / "re-sharded", to="meta", mp=8, dry_run=True)
    assert len(back.files) == 8 and back.tensors == 8 * (126 * 9 + 3)
    assert not list(tmp_path.glob("hf*")) and not list(tmp_path.glob("re-sharded*"))


# Other types


@pytest.mark.parametrize("to", ["hf", "meta"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_casting(dtype, to, tmp_path):
    tensors = write_meta(tmp_path / "meta", params(), mp=2, dtype=torch.float32)
    convert(tmp_path / "meta", tmp_path / "hf32")
    source = tmp_path / "meta" if to == "hf" else tmp_path / "hf32"
    report = convert(source, tmp_path / "out", to=to, dtype=dtype)
    wanted = getattr(torch, dtype)
    errors = [(tensor.to(wanted).double() - tensor.double()).abs().max().item() for tensor in tensors.values()]
    assert report.largest_error == max(errors)
    assert inspect(tmp_path / "out").dtypes == [dtype]
    model = load_meta(tmp_path / "out") if to == "meta" else AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf32").to(wanted)
    ours = model.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.state_dict().items())
    if dtype != "float32":
        assert not verify(source, tmp_path / "out").ok


def test_a_type_that_cannot_hold_the_weights(tmp_path):
    tensors = write_meta(tmp_path / "meta", params())
    tensors["norm.weight"][0] = 1e6
    torch.save(tensors, tmp_path / "meta" / "consolidated.00.pth")
    with pytest.raises(UserError, match=r"--dtype float16 cannot hold 999424, which is in the weights"):
        convert(tmp_path / "meta", tmp_path / "hf", dtype="float16")
    assert not (tmp_path / "hf").exists()


def test_infinities_pass(tmp_path):
    tensors = write_meta(tmp_path / "meta", params())
    tensors["norm.weight"][:2] = torch.tensor([float("inf"), float("nan")])
    torch.save(tensors, tmp_path / "meta" / "consolidated.00.pth")
    assert convert(tmp_path / "meta", tmp_path / "hf", dtype="float16").largest_error < 1e-3
    norm = load_file(tmp_path / "hf" / "model.safetensors")["model.norm.weight"]
    assert norm[0].isinf() and norm[1].isnan()


# Hashes


def test_checklist_is_checked_and_written(tmp_path):
    write_meta(tmp_path / "meta", params(), mp=2)
    lines = [
        f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted((tmp_path / "meta").iterdir())
    ]
    checklist = tmp_path / "meta" / "checklist.chk"
    checklist.write_text("".join(lines) + "0" * 32 + "  not-downloaded.pth\n")
    report = convert(tmp_path / "meta", tmp_path / "out", to="meta", mp=1)
    assert "the source's files have the hashes of its checklist.chk" in report.notes
    for name, kind in (("checklist.chk", "md5"), ("SHA256SUMS", "sha256")):
        sums = dict(reversed(line.split("  ")) for line in (tmp_path / "out" / name).read_text().splitlines())
        assert sums.keys() == {"consolidated.00.pth", "params.json", "huggingface.json"}
        for file, value in sums.items():
            assert hashlib.new(kind, (tmp_path / "out" / file).read_bytes()).hexdigest() == value

    with open(tmp_path / "meta" / "consolidated.01.pth", "r+b") as file:
        file.seek(-2000, 2)
        file.write(b"rot")
    with pytest.raises(
        UserError, match=r"consolidated.01.pth must have the hash \w{32} of checklist.chk, got \w{32}; down"
    ):
        convert(tmp_path / "meta", tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


def test_checklist_of_the_longer_hash(tmp_path):
    """Lists of SHA-256 go about under Meta's name for the list of MD5."""
    write_meta(tmp_path / "meta", params())
    (tmp_path / "meta" / "checklist.chk").write_text(
        f"{hashlib.sha256((tmp_path / 'meta' / 'params.json').read_bytes()).hexdigest()} *params.json"
    )
    assert convert(tmp_path / "meta", tmp_path / "out").verification.ok


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<html>", "it is a web page"),
        ("abc  params.json", "must hold a hash and a file name on each line, got 'abc  params.json'"),
        ("0" * 32 + "  ../params.json", "must hold a hash and a file name"),
        ("z" * 32 + "  params.json", "must hold a hash and a file name"),
    ],
)
def test_damaged_checklist(content, message, tmp_path):
    write_meta(tmp_path / "meta", params())
    (tmp_path / "meta" / "checklist.chk").write_text(content)
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "meta", tmp_path / "out")


def test_without_verification_no_hash_is_taken(tmp_path):
    write_meta(tmp_path / "meta", params())
    (tmp_path / "meta" / "checklist.chk").write_text("0" * 32 + "  params.json\n")
    report = convert(tmp_path / "meta", tmp_path / "out", verify=False)
    assert report.verification is None and "SHA256SUMS" not in report.files


# Tokenizers and what goes with them


def test_padded_vocabulary(tmp_path):
    """More rows than tokens, as resize_token_embeddings(pad_to_multiple_of=...) makes them."""
    write_meta(tmp_path / "meta", params(vocab=SMALL_VOCAB), tokenizer=small_tokenizer(tmp_path))
    convert(tmp_path / "meta", tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    model.resize_token_embeddings(576)
    model.save_pretrained(tmp_path / "padded")
    AutoTokenizer.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "padded")
    report = convert(tmp_path / "padded", tmp_path / "again", to="meta")
    assert any("Meta's own code wants" in note for note in report.notes)
    assert "60 rows of the embedding have no token: the tokenizer has 516" in inspect(tmp_path / "again").inferred
    convert(tmp_path / "again", tmp_path / "back")
    assert verify(tmp_path / "padded", tmp_path / "back").ok


def test_saying_instruct_after_base(tmp_path):
    """What the user says wins over what an earlier conversion kept."""
    write_meta(tmp_path / "meta", params(vocab=SMALL_VOCAB), tokenizer=small_tokenizer(tmp_path))
    convert(tmp_path / "meta", tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "back")
    for source, instruct in (("back", True), ("meta", True), ("back", False)):
        convert(tmp_path / source, tmp_path / f"{source}-{instruct}", to="hf", instruct=instruct)
        generation = json.loads((tmp_path / f"{source}-{instruct}" / "generation_config.json").read_text())
        assert generation["eos_token_id"] == ([261, 269] if instruct else 261)
        assert (tmp_path / f"{source}-{instruct}" / "chat_template.jinja").exists() is instruct


def test_tokens_that_the_configuration_does_not_name(tmp_path):
    """The tokenizer's own files decide what begins a text; where they are lost, the configuration does."""
    write_meta(tmp_path / "meta", params(vocab=SMALL_VOCAB), tokenizer=small_tokenizer(tmp_path))
    convert(tmp_path / "meta", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"bos_token_id": None}))
    convert(tmp_path / "hf", tmp_path / "back")
    convert(tmp_path / "back", tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again")("abcd!")["input_ids"] == [260, 259, 33]
    shutil.rmtree(tmp_path / "back" / "huggingface")
    convert(tmp_path / "back", tmp_path / "anew")
    assert AutoTokenizer.from_pretrained(tmp_path / "anew")("abcd!")["input_ids"] == [259, 33]


def test_hugging_face_folder_with_metas_tokenizer_only(tmp_path):
    write_meta(tmp_path / "meta", params(vocab=SMALL_VOCAB), tokenizer=small_tokenizer(tmp_path))
    convert(tmp_path / "meta", tmp_path / "hf")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "hf" / name).unlink()
    shutil.copy(small_tokenizer(tmp_path), tmp_path / "hf" / "tokenizer.model")
    assert inspect(tmp_path / "hf").tokenizer == "tiktoken"
    convert(tmp_path / "hf", tmp_path / "back")
    assert verify(tmp_path / "meta", tmp_path / "back").tokenizer == "equal"


def test_rewriting_makes_the_folder_portable(tmp_path):
    """What version 5 saves under a name that only it knows gets the one that version 4 knows too."""
    write_meta(tmp_path / "meta", params(vocab=SMALL_VOCAB), tokenizer=small_tokenizer(tmp_path))
    convert(tmp_path / "meta", tmp_path / "hf", instruct=True)
    AutoModelForCausalLM.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "TokenizersBackend"
    assert "rope_theta" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    report = convert(tmp_path / "saved", tmp_path / "portable", to="hf")
    assert report.verification.ok
    assert json.loads((tmp_path / "portable" / "tokenizer_config.json").read_text())["tokenizer_class"] == (
        "PreTrainedTokenizerFast"
    )
    assert json.loads((tmp_path / "portable" / "config.json").read_text())["rope_theta"] == 500000.0
    ours, theirs = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("portable", "hf"))
    assert ours("Hi <|eot_id|>")["input_ids"] == theirs("Hi <|eot_id|>")["input_ids"]
    assert ours.chat_template == theirs.chat_template


def test_real_vocabulary_without_a_tokenizer_still_stops(tmp_path):
    write_meta(tmp_path / "meta", params(vocab=128256))
    report = convert(tmp_path / "meta", tmp_path / "hf", instruct=True)
    assert "no tokenizer was written: the source has none" in report.notes
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [128001, 128009] and generation["bos_token_id"] == 128000
    assert load_meta(tmp_path / "meta").generation_config.eos_token_id == 128001


def test_load_meta_takes_what_from_pretrained_takes(tmp_path):
    write_meta(tmp_path / "meta", params())
    assert load_meta(tmp_path / "meta", torch_dtype=torch.float32).dtype == torch.float32
    model = load_meta(tmp_path / "meta", use_cache=False, attn_implementation="eager", device_map="cpu")
    assert model.config.use_cache is False and model.config._attn_implementation == "eager"
    with pytest.raises(UserError, match="leave out config and state_dict"):
        load_meta(tmp_path / "meta", config=model.config)
    convert(tmp_path / "meta", tmp_path / "hf")
    with pytest.raises(UserError, match="is a Hugging Face folder; load it with from_pretrained"):
        load_meta(tmp_path / "hf")


def test_folding_needs_equal_heads(tmp_path):
    write_meta(tmp_path / "meta", params(kv_heads=2), mp=2)
    checkpoint = open_checkpoint(tmp_path / "meta")
    assert fold_repeated_heads(checkpoint.rows, checkpoint.tensors, checkpoint.config, None) == []


def test_heads_that_are_copies_in_the_first_layer_only(tmp_path):
    layout = params(heads=4, kv_heads=4)
    tensors = meta_tensors(layout)
    for name in ("wk", "wv"):
        key = f"layers.0.attention.{name}.weight"
        tensors[key] = tensors[key].view(2, 2, 16, 64)[:, :1].expand(2, 2, 16, 64).reshape(64, 64)
    (tmp_path / "meta").mkdir()
    for rank, weights in enumerate(shard(tensors, 4)):
        torch.save(weights, tmp_path / "meta" / f"consolidated.{rank:02d}.pth")
    (tmp_path / "meta" / "params.json").write_text(json.dumps(layout))
    for verify_it in (True, False):
        with pytest.raises(UserError, match=r"must hold the same key/value head, as they do in the first layer"):
            convert(tmp_path / "meta", tmp_path / "out", verify=verify_it)
