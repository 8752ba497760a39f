"""The main job from end to end, in small and offline: text, tokenizer, training, both formats, proof, generation."""

import math
import shlex
import sys
import time
from pathlib import Path

from .errors import UserError

STEPS = 160  # under a minute on two cores of 2023
LOOKS = 4  # at the model while it is trained: each costs as much as a few steps
SHARDS = 2
LICENSE = "apache-2.0"  # of the quickstart's own model; a user's is the user's to choose
PROMPT = "The statement"
NEXT = (
    "hf-llama3 generate {hf} 'The class' --max-new-tokens 60 --temperature 0.8",
    "hf-llama3 inspect {meta}",
    "hf-llama3 train --text YOUR_TEXT.txt --output runs/yours",
)


def quickstart(output, text=None) -> None:
    """Make OUTPUT/hf, OUTPUT/meta (two shards) and OUTPUT/hf-again, say at each step what was done and what it proves.

    Raises:
        UserError: the output exists, or the text cannot be trained on.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .conversion import convert, verify
    from .files.atomic import system_errors
    from .model_card import build_card, write_card
    from .text.completion import generate_text
    from .training.data import survey
    from .training.output import check_free
    from .training.recipe import train
    from .training.settings import Settings

    output, started = Path(output), time.perf_counter()
    check_free(output)
    hf, meta, again = output / "hf", output / "meta", output / "hf-again"
    if text is None:
        text = output / "text.txt"
        with system_errors(output, "choose another --output"):
            output.mkdir(parents=True, exist_ok=True)
            text.write_text(python_documentation(), "utf-8")
    survey(Path(text))  # before anything is made

    say(f"1. Train a tokenizer and a small Llama 3 on {text}")
    report = train(text, hf, Settings(steps=STEPS, eval_every=max(STEPS // LOOKS, 1)), progress=True)
    first, last, nothing = report.first_loss, report.validation_loss, math.log(report.vocab_size)
    say(f"   {report.num_parameters:,} parameters, {report.tokens:,} tokens")
    say(f"   validation loss {first:.2f} at the start (ln {report.vocab_size} = {nothing:.2f}), now {last:.2f}")
    write_card(hf / "README.md", build_card(hf, LICENSE))

    say(f"2. Convert to Meta's format, {SHARDS} shards, and back")
    convert(hf, meta, mp=SHARDS, progress=True)
    convert(meta, again, progress=True)
    proof = verify(hf, again, progress=True)
    if not proof.ok:
        raise UserError(f"{again} differs from {hf} in {proof.differences[0]}; please report this")
    say(f"   {proof.tensors} tensors equal to the bit there and back, tokenizer {proof.tokenizer}")

    say(f"3. Load {again} through AutoModelForCausalLM and generate")
    model = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(again, trust_remote_code=False)
    completion = generate_text(model, tokenizer, [PROMPT], max_new_tokens=40, temperature=0.7, top_p=0.9)[0]
    say("   " + (PROMPT + completion.text).replace("\n", "\n   "))

    print()
    for path, meaning in (
        (hf, "model, tokenizer, model card: the portable folder that every tool loads"),
        (meta, f"the same in Meta's format: {SHARDS} shards, params.json, tokenizer.model"),
        (again, "the same, converted back"),
    ):
        size = sum(file.stat().st_size for file in path.iterdir())
        print(f"{path!s:<24} {size / 1e6:6.1f} MB  {meaning}")
    print(f"\nDone in {time.perf_counter() - started:.0f} s. Next:")
    for command in NEXT:
        print("  " + command.format(hf=shlex.quote(str(hf)), meta=shlex.quote(str(meta))))


def say(line: str):
    print(line, file=sys.stderr, flush=True)


def python_documentation() -> str:
    """Return English prose that every CPython carries: the help texts of its keywords and concepts."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))
