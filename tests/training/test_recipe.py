"""Training as a whole: what it leaves, what stops it, and that a stopped run goes on as if nothing had happened."""

import functools
import json
import math
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from checkpoints import SMALL_VOCAB, params, small_tokenizer, write_meta
from command_line import refuse, run
from forked import python
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_llama3.conversion import convert, inspect
from hf_llama3.cpu import processor
from hf_llama3.errors import UserError
from hf_llama3.training import recipe as module
from hf_llama3.training.output import last_checkpoint
from hf_llama3.training.recipe import make_config, train
from hf_llama3.training.settings import PRESETS, make_settings

SHAPE = {"layers": 2, "hidden_size": 32, "heads": 2, "kv_heads": 1, "context": 32}
SMALL = make_settings(tokenizer="char", steps=12, batch_size=4, eval_every=4, dropout=0.1, **SHAPE)


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained") / "out"
    return output, train(text, output, SMALL)


def weights(folder):
    return load_file(folder / "model.safetensors")


def equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_is_left(trained, text, tmp_path):
    output, report = trained
    assert report.first_loss == pytest.approx(math.log(report.vocab_size), abs=0.1)
    assert [step for step, _ in report.curves["validation"]] == [0, 4, 8, 12] and len(report.curves["training"]) == 12
    assert report.validation_loss == min(loss for _, loss in report.curves["validation"]) < report.first_loss
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not (output / "run.json").exists() and not (output / "tokens").exists()
    model, tokenizer = (auto.from_pretrained(output) for auto in (AutoModelForCausalLM, AutoTokenizer))
    assert model.config.model_type == "llama" and model.config.use_cache
    assert tokenizer.decode(tokenizer("The class\n")["input_ids"]) == "The class\n"
    run("convert", output, tmp_path / "meta", "--to", "meta")
    run("generate", output, "The", "--max-new-tokens", 3)
    assert "](curves.png)" in run("card", output, "--license", "mit", "--print").stdout


def test_validation_loss_is_that_of_the_whole_part(trained, text):
    """Computed anew with upstream's class, window by window, over every character of the last tenth."""
    output, report = trained
    model, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    content = text.read_text()
    ids = tokenizer(content[int(len(content) * 0.9) :])["input_ids"]
    total = 0.0
    for start in range(0, len(ids) - 1, SMALL.context):
        window = torch.tensor([ids[start : start + SMALL.context + 1]])
        logits = model(window[:, :-1]).logits
        total += torch.nn.functional.cross_entropy(logits[0], window[0, 1:], reduction="sum").item()
    assert total / (len(ids) - 1) == pytest.approx(report.validation_loss, rel=1e-5)


def test_the_best_is_kept(text, tmp_path):
    """A rate that ruins the model at the end: what is left is not the last."""
    settings = make_settings(tokenizer="char", steps=8, batch_size=4, eval_every=2, learning_rate=0.01, **SHAPE)
    original = module.TextTrainer.training_step

    def ruin(self, *args, **kwargs):
        if self.state.global_step == 5:
            with torch.no_grad():
                self.model.model.norm.weight.mul_(-20)
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.TextTrainer, "training_step", ruin)
        report = train(text, tmp_path / "out", settings)
    assert report.best_step == 4 and report.curves["validation"][-1][1] > 2 * report.validation_loss
    assert weights(tmp_path / "out")["model.norm.weight"].min() > 0


def test_same_seed_same_model(trained, text, tmp_path):
    train(text, tmp_path / "again", SMALL, progress=True)  # what is shown changes nothing
    assert equal(weights(tmp_path / "again"), weights(trained[0]))
    train(text, tmp_path / "other", make_settings(**vars(SMALL) | {"seed": 1}))
    assert not equal(weights(tmp_path / "other"), weights(trained[0]))


KILL = """
import os, signal, sys
from hf_llama3.training import recipe
from hf_llama3.training.recipe import train
import test_recipe
at, text, output = int(sys.argv[1]), sys.argv[2], sys.argv[3]
original = recipe.TextTrainer.training_step
def stop(self, *args, **kwargs):
    if self.state.global_step == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *args, **kwargs)
recipe.TextTrainer.training_step = stop
train(text, output, test_recipe.SMALL)
"""


@pytest.mark.parametrize("at", [2, 7])
def test_killed_and_resumed_bit_for_bit(at, trained, text, tmp_path):
    output, report = trained
    assert python("-c", KILL, at, text, tmp_path / "out").returncode == -9
    assert "is neither" in refuse("inspect", tmp_path / "out"), "half-made, it does not look like a model"
    with pytest.raises(UserError, match="holds an unfinished run; add --resume"):
        train(text, tmp_path / "out", SMALL)
    (tmp_path / "out" / "checkpoint-9").mkdir()  # cut short while it was written
    resumed = train(text, tmp_path / "out", SMALL, resume=True)
    assert equal(weights(tmp_path / "out"), weights(output))
    assert resumed.curves["validation"] == report.curves["validation"]


def test_resuming_what_is_something_else(trained, text, tmp_path):
    python("-c", KILL, 5, text, tmp_path / "out")
    for change, message in (
        ({"seed": 3, "steps": 9}, "was begun with another --steps and --seed; give what it was begun with"),
        ({"tokenizer": "bpe:600"}, "was begun with another --tokenizer"),
    ):
        with pytest.raises(UserError, match=message):
            train(text, tmp_path / "out", make_settings(**vars(SMALL) | change), resume=True)
    (tmp_path / "other.txt").write_text(text.read_text() + "x")
    with pytest.raises(UserError, match="was begun with another text than"):
        train(tmp_path / "other.txt", tmp_path / "out", SMALL, resume=True)
    with pytest.raises(UserError, match="is finished; choose another --output"):
        train(text, trained[0], SMALL, resume=True)


def test_loss_that_is_no_number(text, tmp_path):
    settings = make_settings(tokenizer="char", steps=8, batch_size=4, eval_every=2, **SHAPE)
    original = module.TextTrainer.training_step

    def spoil(self, *args, **kwargs):
        if self.state.global_step == 5:
            with torch.no_grad():
                self.model.model.norm.weight[0] = math.nan
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.TextTrainer, "training_step", spoil)
        with pytest.raises(UserError, match=r"loss of step 6 must be a number, got nan; .* --from .*checkpoint-4"):
            train(text, tmp_path / "out", settings)
    assert last_checkpoint(tmp_path / "out").endswith("checkpoint-4")


def test_full_disk(text, tmp_path):
    """No file may grow beyond what the model's weights take: a sentence, and the run goes on where there is room."""
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000));"
        "from hf_llama3.cli.main import main; sys.argv[0] = 'hf-llama3'; main()"
    )
    shape = ["--layers", "2", "--hidden-size", "32", "--heads", "2", "--kv-heads", "1", "--context", "32"]
    command = ["train", "--text", text, "--output", tmp_path / "out", *shape, "--tokenizer", "char", "--steps", "4"]
    result = python("-c", script, *command, "--batch-size", 4)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert "could not be written" in result.stderr and "add --resume" in result.stderr
    run(*command, "--batch-size", 4, "--resume")
    assert inspect(tmp_path / "out").num_parameters > 0


def test_shares(text, tmp_path):
    settings = make_settings(**vars(SMALL) | {"test_share": 0.1, "steps": 2})
    report = train(text, tmp_path / "out", settings)
    assert abs(report.tokens - 0.8 * 40_000) <= 1 and report.test_loss == pytest.approx(report.validation_loss, abs=0.5)


@pytest.mark.parametrize(
    "more", [{"accumulate": 2}, {"compile": True}, {"checkpointing": True}], ids=lambda more: next(iter(more))
)
def test_ways_to_compute_the_same(more, text, tmp_path, monkeypatch):
    """The same losses in parts, compiled, and with activations computed again: float32 sums in another order."""
    quick = functools.partial(
        module.TrainingArguments, torch_compile_backend="aot_eager" if "compile" in more else None
    )
    monkeypatch.setattr(module, "TrainingArguments", quick)
    plain = train(text, tmp_path / "plain", make_settings(**vars(SMALL) | {"dropout": 0.0, "steps": 4}))
    other = train(text, tmp_path / "other", make_settings(**vars(SMALL) | {"dropout": 0.0, "steps": 4} | more))
    for name, points in plain.curves.items():
        assert [loss for _, loss in other.curves[name]] == pytest.approx([loss for _, loss in points], rel=1e-4), name


def test_in_bfloat16(text, tmp_path):
    """Losses keep the first two digits, and are not float32's."""
    plain, other = [
        train(text, tmp_path / str(bf16), make_settings(**vars(SMALL) | {"dropout": 0.0, "steps": 8, "bf16": bf16}))
        for bf16 in (False, True)
    ]
    theirs, ours = [[loss for _, loss in report.curves["training"]] for report in (plain, other)]
    assert ours == pytest.approx(theirs, rel=1e-2) and ours != pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("instructions", [("avx2", "fma3"), ("avx2", "avx512_f", "avx512_bf16")])
@pytest.mark.parametrize("options", [["--bf16"], []], ids=["bf16", "plain"])
def test_slow_bfloat16_is_said(options, instructions, text, tmp_path, monkeypatch):
    """In one line, before anything is shown of what is done, and only where bfloat16 is asked for and is slow."""
    for place in (torch.cuda, torch.backends.mps):
        monkeypatch.setattr(place, "is_available", lambda: False)
    monkeypatch.setattr(processor, "here", lambda: processor.Processor("a processor", instructions))
    small = ["--tokenizer", "char", "--layers", 1, "--hidden-size", 16, "--heads", 2, "--kv-heads", 1, "--context", 16]
    command = ["train", "--text", text, "--output", tmp_path / "out", *small, "--steps", 1, "--batch-size", 1]
    shown = run(*command, *options, "--validation-share", 0.01).stderr
    note = "Note: --bf16 is slower than float32 on this processor, a processor (avx2, fma3); leave it out to go faster"
    is_slow = bool(options) and "avx512_bf16" not in instructions
    assert shown.count("slower") == is_slow and shown.startswith(note + "\n") == is_slow
    assert module.slow_bfloat16(SimpleNamespace(bf16=True, device=torch.device("cuda"))) is None


@pytest.mark.parametrize("form", ["hf", "meta", "trained here"])
def test_going_on_from(form, trained, text, tmp_path):
    source = tmp_path / "meta"
    if form == "trained here":
        source = trained[0]
    else:
        write_meta(source, params(vocab=SMALL_VOCAB), tokenizer=small_tokenizer(tmp_path), dtype=torch.float32)
        if form == "hf":
            convert(source, tmp_path / "hf")
            source = tmp_path / "hf"
    settings = make_settings(source=str(source), steps=3, batch_size=2, context=16, learning_rate=1e-3)
    assert settings.matrix_learning_rate == 0
    report = train(text, tmp_path / "out", settings)
    before, after = inspect(source), inspect(tmp_path / "out")
    assert after.num_parameters == before.num_parameters == report.num_parameters
    assert after.config["vocab_size"] == before.config["vocab_size"] and after.tied == before.tied
    assert report.validation_loss < report.first_loss
    if form == "trained here":
        assert report.first_loss == pytest.approx(trained[1].validation_loss, rel=0.05)  # the context is half as long
        theirs = AutoTokenizer.from_pretrained(source)
        assert AutoTokenizer.from_pretrained(tmp_path / "out")("class")["input_ids"] == theirs("class")["input_ids"]


def test_going_on_from_a_checkpoint(trained, text, tmp_path):
    """They hold the tokenizer as well, so that a run whose loss broke can be gone on with."""
    source = trained[0] / "checkpoint-12"
    report = train(text, tmp_path / "out", make_settings(source=str(source), steps=2, batch_size=2, context=16))
    assert report.first_loss == pytest.approx(trained[1].validation_loss, rel=0.05)


def test_a_model_that_only_gets_worse(trained, text, tmp_path):
    """What is reported is what is kept: a checkpoint of this run."""
    how = {"steps": 4, "batch_size": 4, "context": 32, "learning_rate": 10.0, "warmup": 0.0, "eval_every": 2}
    report = train(text, tmp_path / "out", make_settings(source=str(trained[0]), **how))
    assert report.best_step > 0 and report.validation_loss > report.first_loss


def test_a_tokenizer_that_was_told_to_cut(trained, text, tmp_path):
    shutil.copytree(trained[0], tmp_path / "source")
    raw = json.loads((tmp_path / "source" / "tokenizer.json").read_text())
    raw["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "source" / "tokenizer.json").write_text(json.dumps(raw))
    settings = make_settings(tokenizer=str(tmp_path / "source"), steps=1, batch_size=2, **SHAPE)
    assert train(text, tmp_path / "out", settings).tokens == 36_000


def test_a_tokenizer_of_another_model(trained, text, tmp_path):
    shutil.copytree(trained[0], tmp_path / "source")
    raw = json.loads((tmp_path / "source" / "tokenizer.json").read_text())
    raw["model"]["vocab"]["€"] = 5000
    (tmp_path / "source" / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"ids must be below the .* rows of the embedding, got 5000"):
        train(text, tmp_path / "out", make_settings(source=str(tmp_path / "source"), context=32))


def test_templates_in_a_folder_of_their_own(trained, text, tmp_path):
    shutil.copytree(trained[0], tmp_path / "source")
    (tmp_path / "source" / "additional_chat_templates").mkdir()
    (tmp_path / "source" / "additional_chat_templates" / "tool.jinja").write_text("{{ 1 }}")
    train(text, tmp_path / "out", make_settings(source=str(tmp_path / "source"), steps=1, batch_size=2, context=32))
    assert (tmp_path / "out" / "additional_chat_templates" / "tool.jinja").read_text() == "{{ 1 }}"


def test_adapters(trained, text, tmp_path):
    """Only they are trained; they are kept, and merged into the model that is left."""
    settings = make_settings(source=str(trained[0]), lora=4, steps=40, batch_size=8, context=32, learning_rate=3e-2)
    report = train(text, tmp_path / "out", settings)
    before, after = weights(trained[0]), weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "q_proj" in name or "v_proj" in name}
    assert report.validation_loss < report.first_loss
    assert json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())["r"] == 4


def test_extras_that_are_missing(trained, text, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # importing it raises
    monkeypatch.setitem(sys.modules, "peft", None)
    report = train(text, tmp_path / "out", make_settings(**vars(SMALL) | {"steps": 1}))
    assert report.notes == ['no picture of the curves was drawn; for one, pip install "hf_llama3[plot]"']
    assert not (tmp_path / "out" / "curves.png").exists()
    with pytest.raises(UserError, match=r'--lora needs peft; pip install "hf_llama3\[peft\]"'):
        train(text, tmp_path / "adapted", make_settings(source=str(trained[0]), lora=2, context=32))


def test_a_context_longer_than_the_models(trained, text, tmp_path):
    settings = make_settings(source=str(trained[0]), context=64)
    with pytest.raises(UserError, match="--context must be at most the 32 tokens"):
        train(text, tmp_path / "out", settings)


@pytest.mark.parametrize(("name", "limit"), [("shakespeare-cpu", 850_000), ("shakespeare-gpu", 10_800_000)])
def test_presets_keep_to_the_budget(name, limit):
    settings = make_settings(name)
    with torch.device("meta"):
        config = make_config({"vocab_size": 66, "bos_token_id": None, "eos_token_id": None}, settings)
        model = module.Llama3ForCausalLM(config)
    assert limit * 0.9 < model.num_parameters() <= limit
    budget = {"shakespeare-cpu": (2000, 12, 64), "shakespeare-gpu": (5000, 64, 256)}[name]
    assert (settings.steps, settings.batch_size, settings.context) == budget and settings.tokenizer == "char"
    assert set(PRESETS) == {"shakespeare-cpu", "shakespeare-gpu"}
