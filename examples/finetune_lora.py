"""Train a LoRA adapter on a text with peft and the Trainer, and merge it into a folder that every tool loads.

    pip install -c constraints.txt -e ".[peft,plot]" && hf-llama3 quickstart
    python examples/finetune_lora.py
    python examples/finetune_lora.py llama-3-8b my-text.txt --context 1024 --steps 500 --learning-rate 2e-4

`hf-llama3 train --from llama-3-8b --lora 16 --text my-text.txt --output tuned` does this and more.
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="quickstart/hf", help="Hugging Face folder")
    parser.add_argument("text", nargs="?", default="quickstart/text.txt", help="in UTF-8")
    parser.add_argument("--output", default="tuned", help="folder to make")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--context", type=int, default=64, help="tokens per window")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    options = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    ids = tokenizer(Path(options.text).read_text("utf-8"), verbose=False)["input_ids"]
    starts = range(0, len(ids) - options.context, options.context)
    windows = [{key: ids[start : start + options.context] for key in ("input_ids", "labels")} for start in starts]
    held_out = max(len(windows) // 10, 1)

    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=options.rank))
    adapted.print_trainable_parameters()
    arguments = TrainingArguments(
        *(options.output,),
        **{"max_steps": options.steps, "learning_rate": options.learning_rate, "logging_steps": 5},
        **{"save_strategy": "no", "report_to": "none", "dataloader_pin_memory": torch.accelerator.is_available()},
    )
    trainer = Trainer(adapted, arguments, train_dataset=windows[:-held_out], eval_dataset=windows[-held_out:])
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    print(f"loss of text that was held out: {before:.3f} before, {trainer.evaluate()['eval_loss']:.3f} after")

    adapted.save_pretrained(f"{options.output}/adapter")
    for part in (adapted.merge_and_unload(), tokenizer):
        part.save_pretrained(f"{options.output}/merged")
    print(f'next: hf-llama3 generate {options.output}/merged "Once upon a time"')


if __name__ == "__main__":
    main()
