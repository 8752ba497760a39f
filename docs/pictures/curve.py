"""Draw the losses of a run beside a text that its model wrote, as SVG.

hf-llama3 train --text tinyshakespeare.txt --output runs/shakespeare --preset shakespeare-cpu
python docs/pictures/curve.py runs/shakespeare
"""

import argparse
import json
import textwrap
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

IMAGE = Path(__file__).parent.parent / "images" / "shakespeare.svg"
NANOGPT_LOSS = 1.88  # github.com/karpathy/nanoGPT, README: its recipe for a CPU, of as many steps and windows
PROMPT, CHARACTERS = "ROMEO:\n", 460


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    facts = json.loads((folder / "training.json").read_text("utf-8"))

    matplotlib.rcParams |= {
        "svg.hashsalt": "curve",
        "svg.fonttype": "none",
        "font.family": ["DejaVu Sans", "sans-serif"],
    }
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    losses, sample = figure.subplots(1, 2, width_ratios=(1, 1))
    for name, points in facts["curves"].items():
        losses.plot(
            *zip(*points, strict=True), label=name, **({"alpha": 0.5} if name == "training" else {"marker": "o"})
        )
    theirs = f"nanoGPT, as many steps: {NANOGPT_LOSS}"
    losses.axhline(NANOGPT_LOSS, color="tab:red", linestyle="--", linewidth=1, label=theirs)
    losses.set(xlabel="step", ylabel="loss, nats per character")
    losses.set_title(
        f"{facts['num_parameters']:,} parameters, validation loss {facts['validation_loss']:.3f}", fontsize=11
    )
    losses.grid(alpha=0.3)
    losses.legend()
    sample.axis("off")
    sample.set_title("what it writes then", fontsize=11, loc="left")
    sample.text(0, 0.98, complete(folder), va="top", fontsize=9, family="monospace", linespacing=1.35)
    figure.savefig(IMAGE, metadata={"Date": None})


def complete(folder: Path) -> str:
    """Let a window move over the text, of half the context that the model was trained on."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    set_seed(1)
    tokens, half = tokenizer(PROMPT, return_tensors="pt")["input_ids"], model.config.max_position_embeddings // 2
    while tokens.shape[1] < CHARACTERS:
        window = tokens[:, -half:]
        longer = model.generate(window, do_sample=True, temperature=0.8, top_p=0.9, max_new_tokens=half)
        tokens = torch.cat([tokens, longer[:, window.shape[1] :]], dim=1)
    written = tokenizer.decode(tokens[0], skip_special_tokens=True).rpartition("\n")[0]
    return "\n".join(textwrap.fill(line, 60, subsequent_indent="  ") for line in written.splitlines())


if __name__ == "__main__":
    main()
