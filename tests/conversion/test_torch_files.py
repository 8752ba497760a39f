"""Weights as torch.save leaves them: pytorch_model.bin, torchtune's and trainers' .pt, and the format without a zip."""

import json
import pickle

import pytest
import torch
from checkpoints import hf_model, meta_tensors, params
from command_line import refuse, run
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from hf_llama3.conversion import convert, inspect, verify
from hf_llama3.conversion.load import load_checkpoint
from hf_llama3.conversion.opening import open_checkpoint
from hf_llama3.errors import UserError


@pytest.fixture
def plain(tmp_path):
    hf_model().save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


@pytest.fixture
def folder(plain, tmp_path):
    """A configuration without weights, beside the whole folder."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_bytes((plain / "config.json").read_bytes())
    return tmp_path / "folder"


def weights():
    return {name: tensor.clone() for name, tensor in hf_model().state_dict().items()}


def halves(tensors):
    names = sorted(tensors)
    return [{name: tensors[name] for name in names[start::2]} for start in range(2)]


def same_logits(folder, plain):
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        ours = load_checkpoint(open_checkpoint(folder))(ids).logits
        return torch.equal(ours, AutoModelForCausalLM.from_pretrained(plain)(ids).logits)


ALONE = {
    "pytorch_model.bin": "pytorch_model.bin",
    "torchtune's": "hf_model_0001_0.pt",
    "a later epoch": "hf_model_0001_3.pt",
    "a trainer's": "checkpoint.pt",
}


@pytest.mark.parametrize("name", ALONE.values(), ids=ALONE)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_one_file(name, zipped, folder, plain, tmp_path):
    torch.save(weights(), folder / name, _use_new_zipfile_serialization=zipped)
    assert inspect(folder).files == [name] and not inspect(folder).loads_as_is
    assert same_logits(folder, plain)
    assert convert(folder, tmp_path / "meta").verification.ok and verify(tmp_path / "meta", plain, logits=True).ok


def test_what_training_leaves_beside_weights_is_not_read(folder, plain):
    torch.save(weights(), folder / "pytorch_model.bin")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin", "recipe_state.pt"):
        (folder / name).write_bytes(b"cos\nsystem\n(S'touch run'\ntR.")
    assert verify(folder, plain).ok
    (folder / "pytorch_model.bin").rename(folder / "model.pt")
    assert verify(folder, plain).ok


PARTS = [f"model-0000{part}-of-00003.safetensors" for part in (1, 2, 3)]


@pytest.mark.parametrize("names", [["weights.safetensors"], PARTS], ids=["one file", "parts"])
def test_safetensors_without_an_index(names, folder, plain):
    """A file under a name of its own; parts of a model whose index was lost."""
    tensors = weights()
    for part, name in enumerate(names):
        save_file({key: tensors[key] for key in sorted(tensors)[part :: len(names)]}, folder / name)
    info = inspect(folder)
    assert f"weights without an index, in {', '.join(names)}" in info.inferred and not info.loads_as_is
    assert verify(plain, folder).ok
    if names[1:]:
        (folder / names[1]).unlink()
        with pytest.raises(UserError, match="lacks part 2 of 3 of model; download it"):
            inspect(folder)


def test_parts_with_an_index(folder, plain):
    weight_map = {}
    for number, part in enumerate(halves(weights()), 1):
        name = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert verify(folder, plain).ok
    torch.save(weights(), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"holds both pytorch_model.bin and pytorch_model.bin.index.json; remove"):
        inspect(folder)


@pytest.mark.parametrize("pattern", ["hf_model_{:04d}_0.pt", "ft-model_{:04d}-of-00002.pt", "m-{:05d}-of-00002_7.bin"])
def test_parts_without_an_index(pattern, folder, plain):
    for number, part in enumerate(halves(weights()), 1):
        torch.save(part, folder / pattern.format(number))
    assert verify(folder, plain).ok
    first = folder / pattern.format(1)
    if "-of-" in pattern:
        first.unlink()
        with pytest.raises(UserError, match=r"lacks part 1 of 2 of .*; download it"):
            inspect(folder)
    else:
        torch.save(halves(weights())[1], first)
        with pytest.raises(UserError, match=r"hf_model_0002_0.pt holds '.*', which another part holds as well"):
            inspect(folder)


def test_several_models_are_not_guessed(folder):
    for epoch in (0, 1):
        torch.save(weights(), folder / f"hf_model_0001_{epoch}.pt")
    with pytest.raises(
        UserError, match=r"holds the weights of the epochs \[0, 1\]; move those of all but one elsewhere"
    ):
        inspect(folder)
    (folder / "hf_model_0001_1.pt").rename(folder / "last.pt")
    with pytest.raises(
        UserError, match=r"holds hf_model_0001_0.pt, last.pt, which have no common name; move the others"
    ):
        inspect(folder)


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", "module"])
def test_weights_beside_the_state_of_a_run(key, folder, plain):
    model = hf_model()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(9)[None], labels=torch.arange(9)[None]).loss.backward()
    optimizer.step()
    state = {"step": 3, "loss": 1.5, "optimizer": optimizer.state_dict(), "best": torch.tensor(1)}
    torch.save(state | {key: weights()}, folder / "ckpt.pt")
    assert verify(folder, plain).ok
    torch.save(state, folder / "ckpt.pt")
    with pytest.raises(UserError, match=r"must hold nothing but tensors by name, got int 'step'"):
        inspect(folder)


def test_tables_of_rope_of_a_type_that_is_not_read(folder, plain):
    tables = {"freqs_cis": torch.zeros(4, dtype=torch.complex64), "model.rotary_emb.inv_freq": torch.zeros(4)}
    torch.save(weights() | tables, folder / "model.pt")
    assert verify(folder, plain).ok
    torch.save(weights() | {"mask": torch.zeros(4, dtype=torch.bool)}, folder / "model.pt")
    with pytest.raises(UserError, match=r"holds tensors of type BoolStorage; only"):
        inspect(folder)
    torch.save(weights() | {"mask": torch.zeros(4, dtype=torch.float8_e5m2)}, folder / "model.pt")
    with pytest.raises(UserError, match=r"holds tensors of type float8_e5m2; only"):
        inspect(folder)


def test_metas_names_beside_params(tmp_path):
    tensors = meta_tensors(params())
    for name, file in (("plain", "consolidated.00.pth"), ("tune", "meta_model_0.pt")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "params.json").write_text(json.dumps(params()))
        torch.save(tensors, tmp_path / name / file, _use_new_zipfile_serialization=name == "plain")
    assert verify(tmp_path / "plain", tmp_path / "tune").ok
    assert convert(tmp_path / "tune", tmp_path / "hf").verification.ok


def test_metas_names_beside_a_config(folder, plain, tmp_path):
    convert(plain, tmp_path / "meta")
    tensors = torch.load(tmp_path / "meta" / "consolidated.00.pth", weights_only=True)
    torch.save(tensors, folder / "meta_model_2.pt")
    assert "names of tensors and order of their rows: Meta's" in inspect(folder).inferred
    assert verify(folder, plain, logits=True).ok and same_logits(folder, plain)


def test_weights_without_a_configuration(tmp_path):
    torch.save(weights(), tmp_path / "hf_model_0001_0.pt")
    with pytest.raises(UserError, match=r"holds hf_model_0001_0.pt but no configuration; .*: cp MODEL/config.json "):
        inspect(tmp_path)


def test_such_a_folder_is_not_pushed(folder, plain):
    torch.save(weights(), folder / "pytorch_model.bin")
    sentence = refuse("push", folder, "me/model", "--license", "mit", "--dry-run")
    assert f"push what hf-llama3 convert {folder} {folder}-whole --to hf makes of it" in sentence
    run("convert", folder, f"{folder}-whole", "--to", "hf")
    run("push", f"{folder}-whole", "me/model", "--license", "mit", "--dry-run")


# The format without a zip, damaged


@pytest.fixture
def old(folder):
    torch.save(weights(), folder / "model.pt", _use_new_zipfile_serialization=False)
    return folder / "model.pt"


@pytest.mark.parametrize("length", [1, 20, 200, 3000, -1, -5000])
def test_truncated(length, old):
    content = old.read_bytes()
    old.write_bytes(content[:length])
    with pytest.raises(UserError, match=r"model.pt is (not a readable PyTorch|truncated at).*; download it again"):
        inspect(old.parent)


def test_every_byte_of_the_lists_may_be_wrong(old):
    content = old.read_bytes()
    for at in range(0, 4000, 37):
        damaged = bytearray(content)
        damaged[at] ^= 0x41
        old.write_bytes(damaged)
        try:
            inspect(old.parent)
        except UserError as error:
            assert "\n" not in str(error)


class Harm:
    def __reduce__(self):
        return pathlib_touch, ("run",)


def pathlib_touch(name):
    raise AssertionError("code ran")


@pytest.mark.parametrize("place", range(5))
def test_no_pickle_runs(place, old):
    pickles = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {}, [])]
    pickles[place] = pickle.dumps(Harm(), 2)
    old.write_bytes(b"".join(pickles))
    with pytest.raises(UserError, match=r"asks to run .*pathlib_touch, which no checkpoint needs; do not trust"):
        inspect(old.parent)


def test_another_pickle(old):
    old.write_bytes(pickle.dumps({"a": 1}, 2) * 5)
    with pytest.raises(UserError, match=r"is a pickle, but none of torch.save's; save the model's state_dict by torch"):
        inspect(old.parent)
