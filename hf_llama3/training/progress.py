"""What training shows while it runs: one bar, and a line for each evaluation."""

import math
import sys
import time

from tqdm import tqdm
from transformers import TrainerCallback


class ProgressBar(TrainerCallback):
    """Show loss, tokens per second and the time left; keep the curves for the report."""

    def __init__(self, tokens_per_step: int, vocab_size: int, show: bool):
        self.tokens_per_step = tokens_per_step
        self.uniform_loss = math.log(vocab_size)  # of a model that takes every token for equally likely
        self.show = show
        self.curves = {"training": [], "validation": []}  # (step, loss in nats per token)
        self.bar = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="training", unit="step", disable=not self.show
        )
        self.started, self.first_step = time.perf_counter(), state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.curves["training"].append((state.global_step, logs["loss"]))
            seconds = time.perf_counter() - self.started
            rate = (state.global_step - self.first_step) * self.tokens_per_step / seconds
            self.bar.set_postfix_str(f"loss {logs['loss']:.3f}, {rate:,.0f} tokens/s")
        if "eval_loss" in logs:
            self.curves["validation"].append((state.global_step, logs["eval_loss"]))
            if self.show:
                scale = f" (knowing nothing: ln(vocabulary) = {self.uniform_loss:.4f})" if not state.global_step else ""
                line = f"step {state.global_step}: validation loss {logs['eval_loss']:.4f}{scale}"
                self.bar.write(line, file=sys.stderr)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()
