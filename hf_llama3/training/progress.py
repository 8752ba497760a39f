"""What training shows while it runs: one bar, and at each evaluation its loss and a sample of text."""

import sys
import time
from collections.abc import Callable

from tqdm import tqdm
from transformers import TrainerCallback


class ProgressBar(TrainerCallback):
    """Show loss, tokens per second and the time left.

    Args:
        sample: makes a text with the model as it is.
    """

    def __init__(self, tokens_per_step: int, sample: Callable[[], str], show: bool):
        self.tokens_per_step, self.sample, self.show = tokens_per_step, sample, show

    def on_train_begin(self, args, state, control, **kwargs):
        done, total = state.global_step, state.max_steps
        self.bar = tqdm(total=total, initial=done, desc="training", unit="step", disable=not self.show)
        self.started, self.first_step = time.perf_counter(), done

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            rate = (state.global_step - self.first_step) * self.tokens_per_step / (time.perf_counter() - self.started)
            self.bar.set_postfix_str(f"loss {logs['loss']:.3f}, {rate:,.0f} tokens/s")

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if self.show and "eval_loss" in metrics:
            sample = self.sample().replace("\n", "\n    ")
            line = f"step {state.global_step}: validation loss {metrics['eval_loss']:.4f}\n    {sample}"
            self.bar.write(line, file=sys.stderr)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()
