"""`evaluate` computes the loss that training computed, and that a plain loop computes."""

import json
import math

import pytest
import torch
from command_line import refuse, run
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_llama3.errors import UserError
from hf_llama3.measure.evaluation import evaluate
from hf_llama3.quickstart import python_documentation
from hf_llama3.training.recipe import train
from hf_llama3.training.settings import make_settings


@pytest.fixture(scope="module", params=["char", "bpe:600"])
def trained(request, tmp_path_factory):
    """A model folder, the text it was validated on, and the loss there."""
    folder = tmp_path_factory.mktemp("evaluation")
    content = python_documentation()[:30_000]
    (folder / "text.txt").write_text(content)
    shape = {"layers": 2, "hidden_size": 32, "heads": 2, "kv_heads": 1, "context": 32}
    settings = make_settings(tokenizer=request.param, steps=10, batch_size=4, **shape)
    report = train(folder / "text.txt", folder / "model", settings)
    (folder / "held-out.txt").write_text(content[27_000:])
    return folder, report


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_against_training(trained):
    folder, report = trained
    model, tokenizer = load(folder / "model")
    result = evaluate(model, tokenizer, folder / "held-out.txt")
    assert result.context == 32 and result.perplexity == math.exp(result.loss)
    if tokenizer.bos_token_id is None:  # training's windows begin with text
        assert result.tokens == 2_999 and result.loss == pytest.approx(report.validation_loss, rel=1e-5)
    else:
        assert result.loss == pytest.approx(report.validation_loss, rel=0.1)


def test_against_a_plain_loop(trained):
    folder, _ = trained
    model, tokenizer = load(folder / "model")
    result = evaluate(model, tokenizer, folder / "held-out.txt", context=10)
    ids = tokenizer((folder / "held-out.txt").read_text(), add_special_tokens=False)["input_ids"]
    begins = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    losses, position = [], 0 if begins else 1
    while position < len(ids):
        window = begins + ids[position - (not begins) :][: 11 - len(begins)]
        with torch.no_grad():
            logits = model(torch.tensor([window])).logits[0, :-1].log_softmax(-1)
        losses += [-logits[index, target].item() for index, target in enumerate(window[1:])]
        position += 10
    assert len(losses) == result.tokens == len(ids) - (not begins)
    assert result.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.parametrize(
    ("content", "context", "message"),
    [
        (b"", None, "at least two tokens .* got 0"),
        (b"a", None, "at least two tokens .* got 1"),
        (b"\xff\xfe", None, "cannot be read: .*utf-8"),
        (None, None, "cannot be read: .*No such file"),
        (b"some text", 33, "--context must be between 1 and 32, got 33"),
    ],
)
def test_refused(content, context, message, trained, tmp_path):
    folder, _ = trained
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    with pytest.raises(UserError, match=message):
        evaluate(*load(folder / "model"), tmp_path / "text", context)


def test_the_smallest_context(trained):
    folder, _ = trained
    result = evaluate(*load(folder / "model"), folder / "held-out.txt", 1)
    assert math.isfinite(result.loss) and result.context == 1


def test_command(trained):
    folder, _ = trained
    arguments = ["evaluate", folder / "model", "--text", folder / "held-out.txt"]
    plain = json.loads(run(*arguments, "--json").stdout)
    (folder / "marked.txt").write_text("\ufeff" + (folder / "held-out.txt").read_text("utf-8"), "utf-8")
    marked = json.loads(run("evaluate", folder / "model", "--text", folder / "marked.txt", "--json").stdout)
    assert [marked[key] for key in ("tokens", "loss")] == [plain[key] for key in ("tokens", "loss")]
    quantized = json.loads(run(*arguments, "--json", "--quantize", "int8").stdout)
    assert quantized["quantize"] == "int8" and quantized["loss"] == pytest.approx(plain["loss"], rel=0.01)
    assert quantized["loss"] != plain["loss"] and plain["text"] == str(folder / "held-out.txt")
    assert "--quantize must be one of" in refuse(*arguments, "--quantize", "int2")
