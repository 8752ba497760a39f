"""The library's Trainer with an exact loss, a stop where there is none, whole checkpoints, and one progress bar."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from hf_llama3.errors import UserError, for_terminal
from hf_llama3.files.atomic import write_files
from hf_llama3.files.progress import Quiet, bar

from .data import IGNORED
from .optimizer import make_optimizer
from .output import last_checkpoint
from .settings import Settings


class TextTrainer(Trainer):
    """Compute the exact mean loss over all tokens, whatever the batches and processes; stop if a loss is not finite."""

    def __init__(self, *args, settings: Settings, **kwargs):
        super().__init__(*args, **kwargs)
        self.settings = settings
        self.model_accepts_loss_kwargs = False  # all windows have as many tokens: a mean of means is the mean

    def create_optimizer(self, model=None):
        self.optimizer = make_optimizer(self.model if model is None else model, self.settings)
        return self.optimizer

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            kept = last_checkpoint(Path(self.args.output_dir))
            is_model = kept and self.settings.lora is None  # adapters are none by themselves
            remedy = f"lower --learning-rate, or go on with --from {kept}" if is_model else "lower --learning-rate"
            raise UserError(f"the loss of step {self.state.global_step + 1} must be a number, got {loss:g}; {remedy}")
        return loss

    @torch.no_grad()
    def evaluation_loop(self, dataloader, description, *unused, metric_key_prefix="eval", **more):
        """Return the mean loss over all tokens of `dataloader`, in nats."""
        model = self.model_wrapped
        model.eval()
        total = torch.zeros(2, device=self.args.device)  # sum of the losses, how many
        for batch in dataloader:
            count = (batch["shift_labels"] != IGNORED).sum()
            with self.compute_loss_context_manager():
                loss = model(**batch, skip_logits=True).loss
            if count:
                total += torch.stack([loss * count, count])
        loss, count = self.accelerator.reduce(total).tolist()
        return EvalLoopOutput(None, None, {f"{metric_key_prefix}_loss": loss / count}, len(dataloader.dataset))


class WholeCheckpoints(TrainerCallback):
    """Evaluate and save at the last step as well, and save the tokenizer with every checkpoint."""

    def __init__(self, tokenizer_files: dict[str, bytes]):
        self.tokenizer_files = tokenizer_files

    def on_save(self, args, state, control, **kwargs):
        if args.should_save:
            write_files(Path(args.output_dir) / f"checkpoint-{state.global_step}", self.tokenizer_files)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True


class ProgressBar(TrainerCallback):
    """Show loss, tokens per second and the time left.

    Args:
        sample: makes a text with the model as it is.
    """

    def __init__(self, tokens_per_step: int, sample: Callable[[], str], show: bool):
        self.tokens_per_step, self.sample, self.show = tokens_per_step, sample, show

    def on_train_begin(self, args, state, control, **kwargs):
        done, total = state.global_step, state.max_steps
        self.bar = bar(total=total, initial=done, desc="training", unit="step", disable=not self.show)
        self.started, self.first_step = time.perf_counter(), done

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            rate = (state.global_step - self.first_step) * self.tokens_per_step / (time.perf_counter() - self.started)
            self.bar.set_postfix_str(f"loss {logs['loss']:.3f}, {rate:,.0f} tokens/s")

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if self.show and "eval_loss" in metrics:
            sample = for_terminal(self.sample()).replace("\n", "\n    ")
            line = f"step {state.global_step}: validation loss {metrics['eval_loss']:.4f}\n    {sample}"
            self.bar.write(line, file=Quiet(sys.stderr))

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()
