"""TRL tunes our class as it tunes upstream's, given the folder alone: the same losses, the same weights."""

import pytest
import torch
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.integrations

QUESTIONS = ["Who sat on the mat?", "What did the cat do?", "Why?", "Where is the dog?"]
ANSWERS = ["The cat.", "It sat.", "It was tired.", "abcd bc ab"]


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


CHATS = [{"messages": user(question) + assistant(answer)} for question, answer in zip(QUESTIONS, ANSWERS, strict=True)]
PREFERENCES = [
    {"prompt": user(question), "chosen": assistant(answer), "rejected": assistant(answer[::-1])}
    for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
]


def trainer(method, folder, rows, output, peft_config=None, **changes):
    import trl
    from datasets import Dataset

    settings = {
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "dataloader_pin_memory": False,
    }
    return getattr(trl, f"{method}Trainer")(
        model=str(folder),
        args=getattr(trl, f"{method}Config")(output_dir=str(output), **settings | changes),
        train_dataset=Dataset.from_list(rows),
        peft_config=peft_config,
    )


METHODS = {
    "SFT": ("SFT", CHATS, {}),
    "SFT, packed": ("SFT", CHATS * 4, {"packing": True, "max_length": 256, "padding_free": True}),
    "DPO": ("DPO", PREFERENCES, {}),
}


@pytest.mark.parametrize("adapters", [False, True], ids=["all weights", "adapters"])
@pytest.mark.parametrize("method", METHODS)
def test_tunes_as_upstream(method, adapters, folders, tmp_path):
    from peft import LoraConfig

    name, rows, changes = METHODS[method]
    trainers = {}
    for kind, folder in folders.items():
        config = LoraConfig(r=4, task_type="CAUSAL_LM") if adapters else None
        trainers[kind] = trainer(name, folder, rows, tmp_path / kind, config, **changes)
        trainers[kind].train()
    logs = [
        [{key: entry[key] for key in entry if key in ("loss", "grad_norm", "rewards/margins")} for entry in log]
        for log in (trainers[kind].state.log_history for kind in ("ours", "upstream"))
    ]
    assert logs[0] == logs[1] and sum("loss" in entry for entry in logs[0]) == 3
    ours, theirs = trainers["ours"].model.state_dict(), trainers["upstream"].model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_tuned_model_is_saved_whole(folders, tmp_path):
    tuned = trainer("SFT", folders["ours"], CHATS, tmp_path)
    tuned.train()
    tuned.save_model()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again).__name__ == "Llama3ForCausalLM"
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in tuned.model.state_dict().items())
