"""The library's Trainer trains our class as it trains upstream's: losses and weights are the same to the bit."""

import copy

import pytest
import torch
from accelerate import Accelerator
from parity import make_pair, same
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

PADDING = 7  # tokens that do not count in every other text


def texts(count=16, length=24):
    """Draw texts of two lengths, so that a mean over texts is not the mean over tokens."""
    ids = torch.randint(3, 96, (count, length), generator=torch.Generator().manual_seed(3))
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row.clone()} for row in ids]
    for row in rows[::2]:
        row["attention_mask"][-PADDING:], row["labels"][-PADDING:] = 0, -100
    return rows


def make_trainer(model, folder, steps=4, **changes):
    settings = {
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    arguments = TrainingArguments(output_dir=str(folder), **settings | changes)
    return Trainer(model=model, args=arguments, train_dataset=texts(), eval_dataset=texts(4))


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def same_weights(ours, theirs):
    theirs = theirs.state_dict()
    for name, weight in ours.state_dict().items():
        same(weight, theirs[name])


@pytest.mark.parametrize("changes", [{}, {"label_smoothing_factor": 0.3}], ids=["plain", "label smoothing"])
def test_trains_as_upstream(changes, tmp_path):
    """Smoothed labels are shifted only for classes in the library's table of causal models."""
    trainers = [make_trainer(model, tmp_path, **changes) for model in make_pair()]
    for trainer in trainers:
        trainer.train()
    ours, theirs = trainers
    assert losses(ours) == losses(theirs) and len(losses(ours)) == 4
    same_weights(ours.model, theirs.model)


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    """Texts of one to a step differ in length: only a sum divided by the step's own number of tokens is right."""
    whole, _ = make_pair()
    pieces = copy.deepcopy(whole)
    make_trainer(whole, tmp_path, steps=1).train()
    small = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    make_trainer(pieces, tmp_path, steps=1, **small).train()
    expected = whole.state_dict()
    for name, weight in pieces.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=2e-6)


def test_loads_the_best_model_at_the_end(tmp_path):
    """The loss falls, so that the first evaluation is the best where the greatest is asked for."""
    model, _ = make_pair(tie_word_embeddings=True)
    every_step = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = make_trainer(model, tmp_path, **best, **every_step)
    trainer.train()
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluated == sorted(set(evaluated), reverse=True) and len(evaluated) == 4
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    same_weights(trainer.model, type(model).from_pretrained(tmp_path / "checkpoint-1"))
    assert trainer.evaluate()["eval_loss"] == evaluated[0]


@pytest.mark.parametrize("tied", [False, True])
def test_resumes_from_a_checkpoint(tied, tmp_path):
    """Optimiser, schedule and order of the texts go on; with weights of its own, a new model takes the saved ones."""
    how = {"optim": "adamw_torch", "lr_scheduler_type": "linear", "save_strategy": "steps", "save_steps": 2}
    model, _ = make_pair(tie_word_embeddings=tied)
    through = make_trainer(model, tmp_path, **how)
    through.train()
    other, _ = make_pair(tie_word_embeddings=tied, seed=1)
    resumed = make_trainer(other, tmp_path, **how)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == losses(through)
    same_weights(resumed.model, through.model)


def test_accelerate_takes_a_step(tmp_path):
    """What `prepare` returns gives the gradients of the plain model, and is saved as one."""
    plain, _ = make_pair()
    model = copy.deepcopy(plain)
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    model, optimizer, batches = accelerator.prepare(model, optimizer, DataLoader(texts(), batch_size=16))
    batch = next(iter(batches))
    accelerator.backward(model(**batch).loss)
    optimizer.step()
    plain(**batch).loss.backward()
    torch.optim.SGD(plain.parameters(), lr=1e-2).step()
    same_weights(model, plain)
    accelerator.unwrap_model(model).save_pretrained(tmp_path, save_function=accelerator.save)
    same_weights(type(plain).from_pretrained(tmp_path), plain)
