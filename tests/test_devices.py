"""Devices, pipes, sockets and folders in the place of every file that a command opens: one sentence, and no waiting."""

import json
import os
import shutil
import signal
import socket
from contextlib import chdir, contextmanager

import pytest
import torch
from checkpoints import SMALL_VOCAB, params, small_tokenizer, write_meta
from command_line import refuse, run
from safetensors.torch import load_file, save_file

from hf_llama3.conversion import convert
from hf_llama3.errors import UserError
from hf_llama3.training import recipe
from hf_llama3.training.recipe import train
from hf_llama3.training.settings import make_settings

TEXT = "The quick brown fox jumps over the lazy dog. " * 400
SECONDS = 20  # of a machine that is busy; to wait for a pipe or to the end of /dev/zero takes for ever
KINDS = ["/dev/zero", "/dev/full", "pipe", "socket", "folder"]
INSPECT, CONVERT, GENERATE = (
    ("inspect", "IT"),
    ("convert", "IT", "OUT"),
    ("generate", "IT", "a", "--max-new-tokens", "1"),
)
CARD, PUSH = ("card", "IT", "--license", "mit"), ("push", "IT", "me/model", "--license", "mit", "--dry-run")
FILES = {  # folder, command -> files in it that the command opens
    ("hf", INSPECT): "config.json generation_config.json chat_template.jinja additional_chat_templates/x.jinja",
    ("hf", CONVERT): "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json tokenizer.model",
    ("hf", GENERATE): "model.safetensors model.safetensors.index.json vocab.json merges.txt vocab.txt",
    ("hf", CARD): "README.md SHA256SUMS provenance.json training.json evaluations.json adapter_config.json",
    ("hf", PUSH): "README.md SHA256SUMS",
    ("sharded", INSPECT): "model.safetensors.index.json model-00001-of-00004.safetensors",
    ("bin", INSPECT): "pytorch_model.bin pytorch_model.bin.index.json",
    ("meta", INSPECT): "params.json consolidated.00.pth tokenizer.model huggingface.json",
    ("meta", CONVERT): "checklist.chk huggingface/tokenizer.json huggingface/tokenizer_config.json",
    ("dcp", INSPECT): ".metadata __0_0.distcp config.json",
    ("gguf", INSPECT): "model.gguf",
    ("packed", GENERATE): "config.json model.safetensors generation_config.json tokenizer.json",
    ("adapter", CONVERT): "adapter_config.json adapter_model.safetensors config.json",
    ("older", CONVERT): "adapter_model.bin",
    ("torchtune", CONVERT): "adapter_0.pt",
}
CASES = [(folder, name, command) for (folder, command), names in FILES.items() for name in names.split()]
PLACES = [
    ("generate", "hf", "--prompts", "PLACE"),
    ("evaluate", "hf", "--text", "PLACE"),
    ("train", "--text", "PLACE", "--output", "OUT"),
    ("quickstart", "--text", "PLACE", "--output", "OUT"),
    ("convert", "PLACE", "OUT"),
    ("inspect", "PLACE"),
    ("card", "hf", "--license", "mit", "--output", "PLACE"),
    ("generate", "hf", "a", "--max-new-tokens", "1", "--output", "PLACE"),
    ("convert", "meta", "PLACE", "--overwrite"),
    ("convert", "meta", "PLACE.gguf", "--overwrite"),
    ("convert", "adapter", "PLACE", "--overwrite"),
    ("pack", "hf", "PLACE", "--quantize", "int8", "--overwrite"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of each kind."""
    made = tmp_path_factory.mktemp("made")
    write_meta(made / "first", params(vocab=SMALL_VOCAB), tokenizer=small_tokenizer(made))
    convert(made / "first", made / "hf", instruct=True)
    for name, options in {"sharded": {"max_shard_size": "100KB"}, "meta": {"to": "meta"}, "dcp": {"to": "dcp"}}.items():
        convert(made / "hf", made / name, **{"to": "hf"} | options)
    (made / "gguf").mkdir()
    convert(made / "hf", made / "gguf" / "model.gguf")
    run("pack", made / "hf", made / "packed", "--quantize", "int8")
    shutil.copytree(made / "hf", made / "bin", ignore=shutil.ignore_patterns("*.safetensors", "SHA256SUMS"))
    torch.save(load_file(made / "hf" / "model.safetensors"), made / "bin" / "pytorch_model.bin")
    (made / "adapter").mkdir()
    shutil.copy(made / "hf" / "config.json", made / "adapter")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    (made / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    pair = {"A": torch.ones(2, 64), "B": torch.ones(64, 2)}
    names = {end: f"base_model.model.model.layers.0.self_attn.q_proj.lora_{end}.weight" for end in pair}
    save_file({names[end]: pair[end] for end in pair}, made / "adapter" / "adapter_model.safetensors")
    for name in ("older", "torchtune"):
        shutil.copytree(made / "adapter", made / name, ignore=shutil.ignore_patterns("*.safetensors"))
    (made / "text.txt").write_text(TEXT)
    return made


def put(kind, place):
    """Put something that is no file in a place, of whatever stood there."""
    if place.is_dir():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    place.parent.mkdir(exist_ok=True)
    match kind:
        case "pipe":
            os.mkfifo(place)
        case "socket":
            with socket.socket(socket.AF_UNIX) as server, chdir(place.parent):
                server.bind(place.name)
        case "folder":
            place.mkdir()
            (place / "mine.txt").write_text("mine")
        case device:
            place.symlink_to(device)


@contextmanager
def in_time():
    def stop(number, frame):
        raise TimeoutError(f"it took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    ("folder", "name", "command"), CASES, ids=lambda value: value if isinstance(value, str) else ""
)
@pytest.mark.parametrize("kind", KINDS)
def test_in_the_place_of_a_file(kind, folder, name, command, made, tmp_path, monkeypatch):
    shutil.copytree(made / folder, tmp_path / folder)
    put(kind, tmp_path / folder / name)
    monkeypatch.chdir(tmp_path)
    with in_time():
        sentence = refuse(*(folder if word == "IT" else word for word in command))
    assert name.split("/")[-1] in sentence, sentence
    assert not list(tmp_path.glob("OUT*"))


@pytest.mark.parametrize("command", PLACES, ids=" ".join)
@pytest.mark.parametrize("kind", KINDS)
def test_in_the_place_of_an_argument(kind, command, made, tmp_path, monkeypatch):
    place = next(word for word in command if word.startswith("PLACE"))
    put(kind, tmp_path / place)
    for name in {"hf", "meta", "adapter"} & set(command):
        (tmp_path / name).symlink_to(made / name)
    monkeypatch.chdir(tmp_path)
    with in_time():
        sentence = refuse(*command)
    assert place in sentence or kind in sentence, sentence  # a link may be followed
    assert not list(tmp_path.glob("OUT*")) and not list(tmp_path.glob("*.partial"))
    assert kind != "folder" or (tmp_path / place / "mine.txt").read_text() == "mine"


def stop_at_step_5(text, output):
    """Train until there are two checkpoints."""
    shape = {"layers": 1, "hidden_size": 32, "heads": 2, "kv_heads": 1, "context": 32}
    settings = make_settings(tokenizer="char", steps=8, batch_size=4, eval_every=2, **shape)
    step = recipe.TextTrainer.training_step

    def stop(self, *arguments, **options):
        if self.state.global_step == 5:
            raise UserError("stopped")
        return step(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="stopped"):
        patch.setattr(recipe.TextTrainer, "training_step", stop)
        train(text, output, settings)
    return settings


def test_in_the_place_of_a_runs_files(made, tmp_path):
    output = tmp_path / "run"
    settings = stop_at_step_5(made / "text.txt", output)
    names = [path.relative_to(output) for path in sorted(output.rglob("*")) if path.is_file()]
    assert {"run.json", "optimizer.pt", "trainer_state.json", "training.bin"} <= {path.name for path in names}
    for name in names:
        for kind in KINDS[:-1]:
            shutil.copytree(output, tmp_path / "again")
            put(kind, tmp_path / "again" / name)
            with in_time(), pytest.raises(UserError, match=f"{name.name} must be a file; it is a folder or a device; "):
                train(made / "text.txt", tmp_path / "again", settings, resume=True)
            shutil.rmtree(tmp_path / "again")
    train(made / "text.txt", output, settings, resume=True)
