"""Training against the field: losses at a fixed budget, speed and memory beside upstream's class.

    OMP_NUM_THREADS=1 python benchmarks/training.py loss --text tinyshakespeare.txt  # preset shakespeare-cpu
    OMP_NUM_THREADS=1 python benchmarks/training.py curve --text tinyshakespeare.txt --bf16 --folder runs/curve
    OMP_NUM_THREADS=1 python benchmarks/training.py speed
    OMP_NUM_THREADS=2 python benchmarks/training.py memory

`loss` times nanoGPT's recipe for the CPU (its README: 2,000 steps of 12 x 64 characters, 4 layers of 128 channels,
evaluations of 2 x 20 batches every 250 steps) in plain torch, runs the preset with three seeds, and once more in as
many steps as fit into nanoGPT's time. `curve` compares the first steps of the GPU preset with a plain configuration
(AdamW, no dropout). The machine comes first, ratios last.
"""

import argparse
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import torch
from machine import describe_machine
from torch import nn

NANOGPT_LOSS, NANOGPT_STEPS, NANOGPT_EVERY = 1.88, 2000, 250
ROUNDS = 3


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["loss", "curve", "speed", "memory"])
    parser.add_argument("--text", type=Path, help="tiny Shakespeare")
    parser.add_argument("--steps", type=int, default=500, help="of `curve`")
    parser.add_argument("--bf16", action="store_true", help="of `curve`: compute in bfloat16")
    parser.add_argument("--folder", type=Path, help="of `curve`: where its runs stay, and are gone on with if stopped")
    parser.add_argument("--seeds", type=int, default=3, help="of `loss`")
    parser.add_argument("--measure", choices=["ours", "upstream"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part in ("loss", "curve") and args.text is None:
        parser.error("--text is needed")
    if args.measure:
        measure_step(args.measure)
        return
    print(describe_machine(), flush=True)
    {"loss": compare_losses, "curve": compare_curves, "speed": compare_speed, "memory": compare_memory}[args.part](args)


def run(text: Path, output: Path | None = None, **options):
    """Train, or go on with training, in `output`, or in a folder that does not stay; return the report."""
    from hf_llama3.files.facts import TRAINING_FACTS
    from hf_llama3.files.json import read_json
    from hf_llama3.training.recipe import train
    from hf_llama3.training.settings import make_settings

    if output is not None:
        if not (output / TRAINING_FACTS).exists():
            output.parent.mkdir(parents=True, exist_ok=True)
            train(text, output, make_settings(**options), resume=output.exists())
        return SimpleNamespace(**read_json(output / TRAINING_FACTS))
    with tempfile.TemporaryDirectory() as folder:
        return train(text, Path(folder) / "out", make_settings(**options), progress=sys.stderr.isatty())


def compare_losses(args):
    limit = time_nanogpt(args.text)
    print(f"nanoGPT's recipe: {limit:.0f} s; published loss {NANOGPT_LOSS}")
    reports = []
    for seed in range(args.seeds):
        reports.append(run(args.text, preset="shakespeare-cpu", seed=seed))
        print(f"shakespeare-cpu, seed {seed}: {describe(reports[-1])}")
    limit = (limit + time_nanogpt(args.text)) / 2
    seconds = statistics.median(report.seconds for report in reports)
    steps = int(NANOGPT_STEPS * min(limit / seconds, 1) * 0.97)  # what starting and saving take stays as it is
    quick = run(args.text, preset="shakespeare-cpu", steps=steps)
    print(f"in nanoGPT's time ({limit:.0f} s), {steps} steps: {describe(quick)}")
    median = statistics.median(report.validation_loss for report in reports)
    print(f"\nmedian of {args.seeds} seeds {median:.4f}, {median / NANOGPT_LOSS:.3f} of nanoGPT's")
    print(f"in the same time {quick.validation_loss:.4f}, {quick.validation_loss / NANOGPT_LOSS:.3f} of nanoGPT's")


def describe(report) -> str:
    speed = f"{report.num_parameters:,} parameters, {report.seconds:.0f} s, {report.tokens_per_second:,.0f} tokens/s"
    return f"validation loss {report.validation_loss:.4f} ({speed})"


def time_nanogpt(text: Path) -> float:
    """Return the seconds of nanoGPT's recipe: the same layers, windows and evaluations in plain torch."""
    torch.manual_seed(0)
    characters = text.read_text("utf-8")
    ids = {character: index for index, character in enumerate(sorted(set(characters)))}
    tokens = torch.tensor([ids[character] for character in characters])
    model = PlainGPT(len(ids))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    started = time.perf_counter()
    for step in range(NANOGPT_STEPS + 1):
        if step % NANOGPT_EVERY == 0:
            with torch.no_grad():
                for _ in range(2 * 20):
                    model(*draw_windows(tokens))
        if step < NANOGPT_STEPS:
            optimizer.zero_grad()
            model(*draw_windows(tokens)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return time.perf_counter() - started


def draw_windows(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    starts = torch.randint(int(0.9 * len(tokens)) - 64, (12, 1)) + torch.arange(64)
    return tokens[starts], tokens[starts + 1]


class PlainGPT(nn.Module):
    """4 layers of 128 channels and 4 heads, as nanoGPT's recipe for the CPU has them."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(vocab_size, 128), nn.Embedding(64, 128)
        shape = {"dim_feedforward": 512, "dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        layer = nn.TransformerEncoderLayer(128, 4, **shape, bias=False)
        self.layers = nn.TransformerEncoder(layer, 4, nn.LayerNorm(128, bias=False), enable_nested_tensor=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(64))

    def forward(self, inputs, targets):
        x = self.embedding(inputs) + self.positions.weight
        logits = self.layers(x, self.mask, is_causal=True) @ self.embedding.weight.T
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def compare_curves(args):
    options = {"preset": "shakespeare-gpu", "steps": args.steps, "eval_every": max(args.steps // 5, 1)}
    options["bf16"] = args.bf16 or None
    plain = {"matrix_learning_rate": 0.0, "learning_rate": 1e-3, "dropout": 0.0}
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:  # only losses count, not times
        runs = []
        for name, more in (("ours", {}), ("plain", plain)):
            runs.append(pool.submit(run, args.text, args.folder and args.folder / name, **options, **more))
        ours, theirs = (run.result() for run in runs)
    print(f"{'step':>6} {'ours':>8} {'plain':>8}")
    for (step, our_loss), (_, their_loss) in zip(ours.curves["validation"], theirs.curves["validation"], strict=True):
        print(f"{step:6} {our_loss:8.4f} {their_loss:8.4f}")
    print(f"\n{describe(ours)}\nratio of the losses {ours.validation_loss / theirs.validation_loss:.3f}")


def make_model(kind: str, **shape):
    """Build our class or upstream's, tied, with the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_llama3 import Llama3Config, Llama3ForCausalLM

    torch.manual_seed(0)
    shape |= {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
    model = Llama3ForCausalLM(Llama3Config(**shape)) if kind == "ours" else LlamaForCausalLM(LlamaConfig(**shape))
    if kind == "ours":
        model.skip_logits_in_training = True
    return model


SHAPES = {
    "shakespeare-cpu's": ({"vocab_size": 66, "hidden_size": 128, "intermediate_size": 352}, 4, 12, 64, 60),
    "12 x wider": ({"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1376}, 8, 4, 256, 8),
}


def compare_speed(args):
    """Tokens per second in the same Trainer, with the same optimiser and windows."""
    ratios = {}
    for name, (shape, heads, batch, context, steps) in SHAPES.items():
        shape = shape | {"num_hidden_layers": 4, "num_attention_heads": heads, "num_key_value_heads": heads}
        speeds = {"ours": [], "upstream": []}
        for _ in range(ROUNDS):
            for kind, measured in speeds.items():
                measured.append(trainer_speed(make_model(kind, **shape), shape["vocab_size"], batch, context, steps))
        ours, theirs = (statistics.median(measured) for measured in speeds.values())
        print(f"{name} shape: ours {ours:,.0f} tokens/s, upstream {theirs:,.0f}")
        ratios[name] = ours / theirs
    print("\n" + "\n".join(f"{name} shape: {ratio:.2f} of upstream's tokens/s" for name, ratio in ratios.items()))


def trainer_speed(model, vocab_size: int, batch: int, context: int, steps: int) -> float:
    from transformers import Trainer, TrainingArguments

    windows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(vocab_size, (batch * steps, context))]
    with tempfile.TemporaryDirectory() as folder:
        how = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
        arguments = TrainingArguments(folder, max_steps=steps, per_device_train_batch_size=batch, **how)
        trainer = Trainer(model, arguments, train_dataset=windows)
        started = time.perf_counter()
        trainer.train()
        return batch * context * steps / (time.perf_counter() - started)


def compare_memory(args):
    """Memory and time of a step with Llama 3's vocabulary, each measurement in a process of its own."""
    results = {"ours": [], "upstream": []}
    for _ in range(ROUNDS):
        for kind, measured in results.items():
            command = [sys.executable, __file__, "memory", "--measure", kind]
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            measured.append(tuple(map(float, printed.split())))
    medians = {
        kind: [statistics.median(column) for column in zip(*rows, strict=True)] for kind, rows in results.items()
    }
    for kind, (mebibytes, seconds) in medians.items():
        print(f"{kind}: {mebibytes:,.0f} MiB above weights, gradients and optimiser state; {seconds:.2f} s a step")
    memory, seconds = (ours / theirs for ours, theirs in zip(*medians.values(), strict=True))
    print(f"\n{memory:.3f} of upstream's memory, {seconds:.2f} of its time")


def measure_step(kind: str):
    """Print the MiB and seconds of a step: hidden 256, 128,256 tokens of vocabulary, 4 x 512 tokens (Linux)."""
    shape = {"vocab_size": 128256, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4}
    model = make_model(kind, **shape, num_attention_heads=4, num_key_value_heads=2).train()
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(128256, (4, 512))
    seconds = []
    for _ in range(4):
        optimizer.zero_grad(set_to_none=False)
        Path("/proc/self/clear_refs").write_text("5")  # the highest resident size starts again from here
        before, started = resident("VmRSS"), time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - started)
        above = resident("VmHWM") - before
    print(above, statistics.median(seconds[1:]))


def resident(key: str) -> float:
    """Return a line of /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


if __name__ == "__main__":
    main()
