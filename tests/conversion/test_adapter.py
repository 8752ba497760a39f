"""LoRA adapters: crossed to Meta's order and back, and merged on the way as PEFT merges them, to the bit."""

import json
import shlex
import shutil
import signal
import subprocess

import numpy as np
import pytest
import torch
from checkpoints import hf_model, params
from command_line import refuse, run
from gguf import GGUFReader
from interruptions import contents, stopped_run
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_llama3.conversion import convert, inspect, verify
from hf_llama3.conversion.adapter.merging import merge_adapter
from hf_llama3.conversion.logits import NUM_TOKENS, compute_logits
from hf_llama3.conversion.opening import open_checkpoint
from hf_llama3.errors import UserError
from hf_llama3.files.atomic import MARKER

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "all layers": {"target_modules": LINEAR},
    "rslora": {"target_modules": LINEAR, "use_rslora": True, "lora_alpha": 3},
    "patterns": {
        "target_modules": LINEAR,
        "rank_pattern": {"k_proj": 3, "^model.layers.1.mlp.up_proj": 7},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 5, "down_proj": 1.5},
    },
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["k_proj", "embed_tokens"]},
    "some layers": {"target_modules": ["k_proj", "o_proj"], "layers_to_transform": [1]},
}


def make(tmp_path, kind="all layers", dtype=torch.bfloat16, tied=False, vocab=512, **more):
    """Save a model, and an adapter that changes it; returns both folders."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    hf_model(dtype=dtype, tied=tied, vocab_size=vocab).save_pretrained(base)
    settings = {"r": 4, "task_type": "CAUSAL_LM", "init_lora_weights": False} | KINDS.get(kind, {}) | more
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), LoraConfig(**settings))
    model.save_pretrained(adapter, save_embedding_layers=False)
    return base, adapter


def merged_by_peft(base, adapter, dtype=torch.bfloat16):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()


def edit(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("kind", KINDS)
def test_merged_as_peft_merges(kind, tmp_path):
    base, adapter = make(tmp_path, kind)
    expected = merged_by_peft(base, adapter)
    report = convert(base, tmp_path / "merged", to="hf", adapter=adapter)
    ours = load_file(tmp_path / "merged" / "model.safetensors")
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in ours)
    assert any(not torch.equal(one, load_file(base / "model.safetensors")[name]) for name, one in ours.items())
    assert any(line.startswith(f"merged {adapter} into ") for line in report.inferred)
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


def test_what_lies_beside_an_adapter_is_named(tmp_path):
    """A tokenizer that was trained with, for example: the merged model has its own model's."""
    base, adapter = make(tmp_path)
    (adapter / "tokenizer.json").write_text("{}")
    report = convert(base, tmp_path / "merged", to="hf", adapter=adapter)
    assert "left out, since it is none of an adapter's files: README.md, tokenizer.json" in report.inferred


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_types(dtype, tmp_path):
    base, adapter = make(tmp_path, dtype=dtype)
    expected = merged_by_peft(base, adapter, dtype)
    convert(base, tmp_path / "merged", to="hf", adapter=adapter)
    ours = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


def test_an_adapter_in_bfloat16(tmp_path):
    base, adapter = make(tmp_path)
    path = adapter / "adapter_model.safetensors"
    save_file({name: one.bfloat16() for name, one in load_file(path).items()}, path)
    expected = merged_by_peft(base, adapter)
    convert(base, tmp_path / "merged", to="hf", adapter=adapter)
    ours = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


@pytest.mark.parametrize("mp", [1, 2])
def test_merged_from_and_into_metas_format(mp, tmp_path):
    """Shards hold parts of a product, and rows in the other order; the bits are the same."""
    base, adapter = make(tmp_path)
    convert(base, tmp_path / "merged", to="hf", adapter=adapter)
    convert(base, tmp_path / "meta", mp=mp)
    convert(tmp_path / "meta", tmp_path / "merged-from-meta", adapter=adapter)
    convert(tmp_path / "meta", tmp_path / "merged-meta", to="meta", mp=2, adapter=adapter)
    for name in ("merged-from-meta", "merged-meta"):
        report = verify(tmp_path / "merged", tmp_path / name)
        assert [one for one in report.differences if "tensor" not in one] == []
        assert report.tensors == 21


@pytest.mark.parametrize("rows", [2048, 3001])
def test_bands_of_a_product(rows, tmp_path, monkeypatch):
    """Rows that are made a band at a time have the bits of all that are made at once."""
    from hf_llama3.conversion.adapter import merging

    base, adapter = make(tmp_path, "head", vocab=rows)
    expected = merged_by_peft(base, adapter)["lm_head.weight"]
    merged = merge_adapter(open_checkpoint(base), adapter).tensors["lm_head.weight"][0].array
    made = []
    make_band = merging.Product.make
    monkeypatch.setattr(merging.Product, "make", lambda self, *band: made.append(band) or make_band(self, *band))
    blocks = np.concatenate([merged[start : start + 100] for start in range(0, rows, 100)])
    assert torch.equal(torch.from_numpy(blocks.view("<i2")).view(torch.bfloat16), expected)
    assert set(made) == {(0, 1024), (1024, rows)}


def by_hand(base_meta, adapter_meta, target):
    """Merge in Meta's order with nothing but torch: each weight of a shard plus B @ A, times 2 (alpha 8, rank 4)."""
    shutil.copytree(base_meta, target)
    (target / "checklist.chk").unlink()
    weights = torch.load(target / "consolidated.00.pth", weights_only=True)
    pairs = load_file(adapter_meta / "adapter_model.safetensors")
    for name in [name for name in pairs if name.endswith("lora_A.weight")]:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        delta = pairs[name.replace("lora_A", "lora_B")] @ pairs[name] * 2
        weights[f"{module}.weight"] = (weights[f"{module}.weight"].float() + delta).to(torch.bfloat16)
    torch.save(weights, target / "consolidated.00.pth")


def test_crossed_to_metas_order(tmp_path):
    """Equal logits of base and adapter: transformers and PEFT on one side, Meta's rotation on the other."""
    base, adapter = make(tmp_path)
    convert(base, tmp_path / "meta")
    report = convert(adapter, tmp_path / "adapter-meta")
    assert (report.source_format, report.target_format, report.tensors) == ("adapter, hf", "adapter, meta", 28)
    by_hand(tmp_path / "meta", tmp_path / "adapter-meta", tmp_path / "merged-meta")
    ours = compute_logits(open_checkpoint(tmp_path / "merged-meta"), lambda count: None)

    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload().float()
    ids = torch.tensor([[(1 + 7919 * index) % 512 for index in range(NUM_TOKENS)]])
    positions = torch.linspace(0, 8191, NUM_TOKENS).long()[None]
    with torch.no_grad():
        expected = theirs(ids, position_ids=positions, attention_mask=torch.ones_like(ids)).logits[0]
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5 * expected.abs().max().item())
    config = json.loads((tmp_path / "adapter-meta" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["w1", "w2", "w3", "wk", "wo", "wq", "wv"]


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind, tmp_path):
    base, adapter = make(tmp_path, kind)
    convert(adapter, tmp_path / "meta")
    convert(tmp_path / "meta", tmp_path / "back")
    name = "adapter_config.json"
    assert (tmp_path / "back" / name).read_bytes() == (adapter / name).read_bytes()
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "back", adapter))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    convert(base, tmp_path / "one", to="hf", adapter=adapter)
    convert(base, tmp_path / "other", to="hf", adapter=tmp_path / "meta")
    assert verify(tmp_path / "one", tmp_path / "other").ok


def test_what_the_command_says(tmp_path):
    _, adapter = make(tmp_path)
    said = run("convert", adapter, tmp_path / "meta").stdout
    assert f"{adapter}, a LoRA adapter in Hugging Face's order" in said and "read back and put in order" in said
    assert f"Next: hf-llama3 convert MODEL merged --adapter {tmp_path / 'meta'}" in said


@pytest.mark.parametrize("beside_a_model", [False, True])
def test_the_command_that_is_named_merges_it(beside_a_model, tmp_path):
    base, adapter = make(tmp_path)
    expected = merged_by_peft(base, adapter)
    if beside_a_model:
        shutil.copytree(base, adapter, dirs_exist_ok=True)
    command = shlex.split(refuse("generate", adapter, "a").partition(" hf-llama3 ")[2])
    assert command[:2] == ["convert", str(base)]
    run(*command)
    ours = load_file(f"{adapter}-merged/model.safetensors")
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in ours)


def test_peft_loads_it_beside_metas_modules(tmp_path):
    _, adapter = make(tmp_path, "patterns")
    convert(adapter, tmp_path / "meta")

    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.wq, self.wo = torch.nn.Linear(64, 64, bias=False), torch.nn.Linear(64, 64, bias=False)
            self.wk, self.wv = torch.nn.Linear(64, 32, bias=False), torch.nn.Linear(64, 32, bias=False)

    class FeedForward(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w1, self.w3 = torch.nn.Linear(64, 192, bias=False), torch.nn.Linear(64, 192, bias=False)
            self.w2 = torch.nn.Linear(192, 64, bias=False)

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.feed_forward = Attention(), FeedForward()

    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([Layer(), Layer()])
    loaded = PeftModel.from_pretrained(model, tmp_path / "meta")
    state = {name.replace(".default", ""): one for name, one in loaded.state_dict().items() if "lora_" in name}
    written = load_file(tmp_path / "meta" / "adapter_model.safetensors")
    assert state.keys() == written.keys() and all(torch.equal(state[name], written[name]) for name in state)
    attention = loaded.base_model.model.layers[0].attention
    assert (attention.wq.scaling["default"], attention.wk.r["default"]) == (5 / 4, 3)


def drop(name):
    def change(folder):
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        del tensors[next(key for key in sorted(tensors) if name in key)]
        save_file(tensors, path)

    return change


def add_tensor(folder):
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.lm_head.weight": torch.zeros(512, 64)}, path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: edit(folder, peft_type="IA3"), "`peft_type` .* must be 'LORA', got 'IA3'; merge it by PEFT: "),
        (
            lambda folder: edit(folder, use_dora=True),
            r"asks for DoRA \(`use_dora`\), which is not LoRA alone; merge it",
        ),
        (lambda folder: edit(folder, lora_bias=True), r"asks for biases of its own \(`lora_bias`\)"),
        (
            lambda folder: edit(folder, modules_to_save=["lm_head"]),
            r"asks for whole modules beside the narrow matrices",
        ),
        (lambda folder: edit(folder, bias="all"), "`bias` .* must be 'none', got 'all'; merge it by PEFT"),
        (
            lambda folder: edit(folder, init_lora_weights="pissa"),
            "began with 'pissa', which changes the model's weights",
        ),
        (
            lambda folder: edit(folder, r=8),
            "the rank of .* must be 8 by its adapter_config.json, got A .*; download it",
        ),
        (lambda folder: edit(folder, r="4"), "`r` in .* must be a whole number"),
        (
            lambda folder: edit(folder, rank_pattern={"(a+)+$": 3}),
            r"must be names of modules, got '\(a\+\)\+\$'; write",
        ),
        (drop("lora_B"), "lacks the matrix B for "),
        (add_tensor, "holds 'base_model.model.lm_head.weight', which is no LoRA of a Llama's weight; merge it by PEFT"),
        (
            lambda folder: (folder / "adapter_model.safetensors").unlink(),
            "but no adapter_model.safetensors; download it",
        ),
    ],
)
def test_what_is_more_than_lora_is_refused(change, words, tmp_path):
    base, adapter = make(tmp_path)
    change(adapter)
    for arguments in ((base, tmp_path / "merged", "hf"), (adapter, tmp_path / "crossed")):
        with pytest.raises(UserError, match=words):
            convert(*arguments, **({"adapter": adapter} if arguments[0] == base else {}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_an_adapter_of_another_model(tmp_path):
    _, adapter = make(tmp_path, "head", vocab=500)
    hf_model().save_pretrained(tmp_path / "other")
    with pytest.raises(
        UserError, match=r"lm_head.weight of .* is \[512, 64\], and .* is for \[500, 64\]; take its own"
    ):
        convert(tmp_path / "other", tmp_path / "merged", to="hf", adapter=adapter)


def test_an_adapter_of_a_deeper_model(tmp_path):
    _, adapter = make(tmp_path)
    hf_model(num_hidden_layers=1).save_pretrained(tmp_path / "shallow")
    with pytest.raises(UserError, match=r"stands beside model.layers.1.*, which .* has not; take its own model"):
        convert(tmp_path / "shallow", tmp_path / "merged", to="hf", adapter=adapter)


def test_a_head_that_is_the_embedding(tmp_path):
    base, adapter = make(tmp_path, "head", tied=True)
    with pytest.raises(
        UserError, match=r"changes lm_head.weight, which is embedding and head of .* at once; untie them"
    ):
        convert(base, tmp_path / "merged", to="hf", adapter=adapter)


def test_heads_of_unknown_width(tmp_path):
    base, adapter = make(tmp_path)
    edit(adapter, base_model_name_or_path="someone/model")
    with pytest.raises(
        UserError, match=r"does not say how wide a head is, .*'someone/model' is no folder here; put that"
    ):
        convert(adapter, tmp_path / "meta")
    shutil.copy(base / "config.json", adapter)
    (adapter / "notes.txt").write_text("mine")
    report = convert(adapter, tmp_path / "meta", dry_run=True)
    assert any("left out" in note and "notes.txt" in note for note in report.notes)
    assert not (tmp_path / "meta").exists()


def test_options_that_an_adapter_has_no_use_for(tmp_path):
    _, adapter = make(tmp_path)
    with pytest.raises(UserError, match="--mp is for a model, got 2 with an adapter; leave it out"):
        convert(adapter, tmp_path / "meta", mp=2)
    with pytest.raises(
        UserError, match="--to must be 'meta' or 'gguf' for an adapter in Hugging Face's order, got 'hf'"
    ):
        convert(adapter, tmp_path / "meta", to="hf")
    with pytest.raises(UserError, match=r"--to gguf makes one file, so TARGET must end with \.gguf, got 'crossed'"):
        convert(adapter, tmp_path / "crossed", to="gguf")
    with pytest.raises(UserError, match=r"--adapter must be a folder with an adapter_config.json, got "):
        convert(tmp_path / "base", tmp_path / "merged", adapter=tmp_path / "base")


@pytest.mark.parametrize("name", ["crossed", "crossed.gguf"])
def test_overwrite(name, tmp_path):
    """Another adapter is replaced, by one that is whole; what this package cannot make again is not."""
    _, adapter = make(tmp_path)
    target = tmp_path / name
    convert(adapter, target)
    expected = contents(target)
    edit(adapter, lora_alpha=3)
    with pytest.raises(UserError, match=r"crossed.* already exists; choose another target or add --overwrite"):
        convert(adapter, target)
    convert(adapter, target, overwrite=True, dry_run=True)
    assert contents(target) == expected
    convert(adapter, target, overwrite=True)
    changed = contents(target)
    assert changed != expected and sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", name]
    convert(adapter, tmp_path / f"again-{name}")
    assert contents(tmp_path / f"again-{name}") == changed


@pytest.mark.parametrize(
    ("name", "words"), [("base", "base is no adapter, so it is not"), ("notes.gguf", "gguf is no GGUF file, so it is")]
)
def test_what_is_no_adapter_is_not_replaced(name, words, tmp_path):
    _, adapter = make(tmp_path)
    (tmp_path / "notes.gguf").write_text("mine")
    before = contents(tmp_path / name)
    with pytest.raises(UserError, match=words):
        convert(adapter, tmp_path / name, overwrite=True)
    assert contents(tmp_path / name) == before


@pytest.mark.parametrize("name", ["crossed", "crossed.gguf"])
def test_stopped_as_an_adapter_is_replaced(name, tmp_path):
    """The old one or the new one stands there, whole, and a second run ends as one that was not stopped."""
    _, adapter = make(tmp_path)
    target = tmp_path / name
    edit(adapter, lora_alpha=8)
    convert(adapter, target)
    old = contents(target)
    edit(adapter, lora_alpha=3)
    total = int(stopped_run("kill", -1, adapter, target, {"overwrite": True}).stdout)
    new = contents(target)
    assert total > 10 and new != old
    for at in (total // 2, total - 4, total - 2, total):
        edit(adapter, lora_alpha=8)
        convert(adapter, target, overwrite=True)
        edit(adapter, lora_alpha=3)
        assert stopped_run("kill", at, adapter, target, {"overwrite": True}).returncode == -signal.SIGKILL
        assert contents(target) in (old, new), at
        convert(adapter, target, overwrite=True)
        assert contents(target) == new and {path.name for path in tmp_path.iterdir()} == {"adapter", "base", name}


def test_what_another_run_left_is_no_part_of_an_adapter(tmp_path):
    base, adapter = make(tmp_path)
    stopped_run("kill", 25, base, tmp_path / "crossed", {"to": "hf", "max_shard_size": "60KB"})
    unfinished = tmp_path / "crossed.partial"
    assert len(list(unfinished.iterdir())) > 1
    convert(adapter, tmp_path / "crossed")
    assert contents(tmp_path / "crossed").keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert not unfinished.exists()


def test_an_unfinished_adapter_is_not_read(tmp_path):
    base, adapter = make(tmp_path)
    (adapter / MARKER).touch()
    for arguments in ((base, tmp_path / "merged", "hf"), (adapter, tmp_path / "crossed")):
        with pytest.raises(UserError, match="adapter is not finished; run the command that was writing it again"):
            convert(*arguments, **({"adapter": adapter} if arguments[0] == base else {}))


MODULES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2", "o_proj": "output_proj", "lm_head": "output"}


def leave_as_torchtune(adapter, name="adapter_0.pt"):
    """Replace an adapter's matrices by the file of torchtune's own form, with a model of head_dim 8 in mind."""
    state = {}
    for key, matrix in load_file(adapter / "adapter_model.safetensors").items():
        *path, module, end, weight = key.removeprefix("base_model.model.").removeprefix("model.").split(".")
        if end == "lora_B" and module in ("q_proj", "k_proj"):
            matrix = matrix.view(-1, 2, 4, matrix.shape[1]).transpose(1, 2).reshape(matrix.shape)
        path = ["attn" if part == "self_attn" else part for part in path]
        state[".".join([*path, MODULES.get(module, module), end.lower(), weight])] = matrix.clone()
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(state, adapter / name)


@pytest.mark.parametrize("kind", ["all layers", "head"])
@pytest.mark.parametrize("name", ["adapter_0.pt", "adapter_model.pt"])
def test_torchtunes_own_file(name, kind, tmp_path):
    base, adapter = make(tmp_path, kind)
    as_in_peft = shutil.copytree(adapter, tmp_path / "peft")
    leave_as_torchtune(adapter, name)
    assert "layers.0.attn.q_proj.lora_a.weight" in torch.load(adapter / name)
    convert(adapter, tmp_path / "back")
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "back", as_in_peft))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    convert(base, tmp_path / "merged", to="hf", adapter=adapter)
    convert(base, tmp_path / "expected", to="hf", adapter=as_in_peft)
    assert verify(tmp_path / "merged", tmp_path / "expected").ok


def test_torchtunes_file_without_a_configuration(tmp_path):
    """As its checkpointer for Meta's format leaves it; the command that is named gives it one."""
    base, adapter = make(tmp_path)
    convert(base, tmp_path / "expected", to="hf", adapter=adapter)
    leave_as_torchtune(adapter)
    (adapter / "adapter_config.json").unlink()
    for beside in (None, "config.json", "params.json"):
        if beside == "config.json":
            shutil.copy(base / beside, adapter)
        if beside == "params.json":
            (adapter / beside).write_text(json.dumps(params()))
        said = refuse("convert", adapter, tmp_path / "crossed")
        assert "holds adapter_0.pt, an adapter of torchtune's, but no adapter_config.json, which says how it is" in said
        if beside:
            (adapter / beside).unlink()
    command = refuse("convert", base, tmp_path / "merged", "--to", "hf", "--adapter", adapter).partition("recipe: ")[2]
    subprocess.run(command.replace("RANK", "4").replace("ALPHA", "8"), shell=True, check=True)
    convert(base, tmp_path / "merged", to="hf", adapter=adapter)
    assert verify(tmp_path / "merged", tmp_path / "expected").ok


def test_torchtunes_files_of_several_epochs(tmp_path):
    _, adapter = make(tmp_path)
    leave_as_torchtune(adapter)
    shutil.copy(adapter / "adapter_0.pt", adapter / "adapter_1.pt")
    with pytest.raises(UserError, match=r"holds the adapters adapter_0.pt, adapter_1.pt; move all but one elsewhere"):
        convert(adapter, tmp_path / "crossed")


def test_what_is_more_than_lora_in_torchtunes_file(tmp_path):
    _, adapter = make(tmp_path)
    leave_as_torchtune(adapter)
    path = adapter / "adapter_0.pt"
    torch.save(torch.load(path) | {"layers.0.attn.q_proj.magnitude": torch.ones(64)}, path)
    with pytest.raises(UserError, match=r"holds 'layers.0.attn.q_proj.magnitude', which is no LoRA of a Llama's"):
        convert(adapter, tmp_path / "crossed")


def test_torchtunes_adapter_without_a_model_where_one_is_wanted(tmp_path):
    base, adapter = make(tmp_path)
    leave_as_torchtune(adapter, "adapter_model.pt")
    for beside in ("config.json", "params.json"):
        if beside == "config.json":
            shutil.copy(base / beside, adapter)
        else:
            (adapter / beside).write_text(json.dumps(params()))
        merge = f"merge it into its model: hf-llama3 convert {base} {adapter}-merged --to hf --adapter {adapter}"
        assert refuse("inspect", adapter).endswith(f"is an adapter, not a model; {merge}")
        (adapter / beside).unlink()


def test_the_adapter_that_torchtune_has_merged_into_safetensors(tmp_path):
    """transformers would take the model that its configuration names, and add it to that."""
    base, adapter = make(tmp_path)
    convert(base, tmp_path / "merged", to="hf", adapter=adapter)
    leave_as_torchtune(adapter, "adapter_model.pt")
    shutil.copytree(adapter, tmp_path / "merged", dirs_exist_ok=True)
    found = inspect(tmp_path / "merged")
    assert "the adapter beside the weights is left out: torchtune has merged it into them" in found.inferred
    assert not found.loads_as_is
    convert(tmp_path / "merged", tmp_path / "alone", to="hf")
    assert verify(tmp_path / "merged", tmp_path / "alone").ok and inspect(tmp_path / "alone").loads_as_is
    assert not (tmp_path / "alone" / "adapter_config.json").exists()


def gguf_delta(path, name):
    """Compute what llama.cpp adds to a weight: B @ A by alpha / rank, of an embedding turned over."""
    reader = GGUFReader(path)
    alpha = reader.fields["adapter.lora.alpha"].contents()
    a, b = (next(one.data for one in reader.tensors if one.name == f"{name}.weight.lora_{end}") for end in "ab")
    rank = b.shape[1]
    added = (b @ a.T).T if name == "token_embd" else b @ a
    return added * (alpha / rank if alpha else 1)


@pytest.mark.parametrize("kind", ["all layers", "rslora", "patterns", "head", "embedding"])
def test_an_adapter_for_llama_cpp(kind, tmp_path):
    """Read by llama.cpp's own package: what is added to each weight of GGUF, in its order of rows."""
    base, adapter = make(tmp_path, kind, dtype=torch.float32)
    report = convert(adapter, tmp_path / "adapter.gguf")
    assert report.target_format == "adapter, gguf"
    assert any("scales of their own" in note for note in report.notes) is (kind == "patterns")
    reader = GGUFReader(tmp_path / "adapter.gguf")
    says = {key: reader.fields[key].contents() for key in ("general.type", "general.architecture", "adapter.type")}
    assert says == {"general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora"}
    convert(base, tmp_path / "base.gguf", to="gguf")
    convert(base, tmp_path / "merged.gguf", to="gguf", adapter=adapter)
    files = (tmp_path / name for name in ("base.gguf", "merged.gguf"))
    before, after = ({one.name: one.data for one in GGUFReader(file).tensors} for file in files)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert {one.name.rpartition(".lora_")[0] for one in reader.tensors} == changed
    for name in changed:
        ours = gguf_delta(tmp_path / "adapter.gguf", name.removesuffix(".weight"))
        np.testing.assert_allclose(ours, after[name] - before[name], rtol=0, atol=1e-5 * np.abs(ours).max())
