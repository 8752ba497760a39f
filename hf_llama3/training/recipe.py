"""Training from scratch, from top to bottom: data, tokenizer, model, optimiser, loop, report.

The loop is `transformers.Trainer`; what it does (devices, accumulation, clipping, schedules, saving) is set, not
written again. The folder that is left is the portable one: every tool reads it.
"""

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from hf_llama3.configuration_llama3 import Llama3Config
from hf_llama3.conversion.hf_config import make_portable
from hf_llama3.conversion.manifest import TRAINING_FACTS
from hf_llama3.conversion.params import feed_forward_size
from hf_llama3.errors import UserError
from hf_llama3.modeling_llama3 import Llama3ForCausalLM

from .data import ConsecutiveWindows, RandomWindows, read_text, split_text
from .optimizer import MuonWithAdamW
from .progress import ProgressBar
from .settings import Settings
from .tokenizer import make_tokenizer, train_bpe


@dataclass
class TrainingReport:
    """Say what was trained and how well; losses are nats per token."""

    output: str
    text: str
    tokens: int  # of the training part
    vocab_size: int
    num_parameters: int
    context: int
    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    first_loss: float  # on the validation part, before training
    validation_loss: float
    seconds: float
    curves: dict[str, list[tuple[int, float]]]

    def to_dict(self) -> dict:
        return asdict(self)


def train(text, output, settings: Settings = Settings(), progress: bool = False) -> TrainingReport:  # noqa: B008
    """Train a Llama 3 from scratch on a text and leave a model folder in `output`.

    Args:
        text: file in UTF-8; the first nine tenths train, the rest validates.
        output: folder to make.
        progress: show a bar on standard error.

    Raises:
        UserError: the text cannot be read or is too short, the output exists, or the shape is impossible.
    """
    started, text, output = time.perf_counter(), Path(text), Path(output)
    check_output(output)
    set_seed(settings.seed)
    context, steps = settings.context, settings.steps

    # Data and tokenizer
    training_text, validation_text = split_text(read_text(text))
    tokens = train_bpe([training_text], settings.vocab_size)
    tokenizer_files, vocabulary = make_tokenizer(tokens, context)
    encoder = Tokenizer.from_buffer(tokenizer_files["tokenizer.json"])
    training, validation = (encode(encoder, part) for part in (training_text, validation_text))
    if len(validation) <= context:
        raise UserError(
            f"{text} is too short for windows of {context} tokens: the tenth that validates has {len(validation)}; "
            "take a longer text or a smaller --context"
        )

    # Model
    try:
        config = Llama3Config(
            **vocabulary,
            hidden_size=settings.hidden_size,
            intermediate_size=feed_forward_size(settings.hidden_size, 32, None),
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.kv_heads,
            max_position_embeddings=context,
            tie_word_embeddings=True,
        )
    except (StrictDataclassError, ValueError) as error:
        raise UserError(f"no model has this shape: {error.__cause__ or error}") from error
    model = Llama3ForCausalLM(config)

    # Optimiser and loop
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(steps // 10, 1),
        max_grad_norm=1.0,
        eval_strategy="steps",
        eval_steps=settings.eval_every or max(steps // 5, 1),
        eval_on_start=True,
        save_strategy="no",
        logging_steps=max(steps // 50, 1),
        disable_tqdm=True,
        remove_unused_columns=False,  # or `shift_labels` is, and the model shifts the labels a second time
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=[],
        seed=settings.seed,
        data_seed=settings.seed,
    )
    bar = ProgressBar(settings.batch_size * context, config.vocab_size, progress)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=RandomWindows(training, context, steps * settings.batch_size, settings.seed),
        eval_dataset=ConsecutiveWindows(validation, context),
        callbacks=[bar],
        optimizers=(MuonWithAdamW(model, settings.learning_rate, settings.matrix_learning_rate), None),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()

    # Report
    for name, content in tokenizer_files.items():
        (output / name).write_bytes(content)
    model.config.use_cache = True  # the Trainer switched it off
    model.save_pretrained(output)
    make_portable(output)
    report = TrainingReport(
        output=str(output),
        text=text.name,
        tokens=len(training),
        vocab_size=config.vocab_size,
        num_parameters=model.num_parameters(),
        context=context,
        steps=steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        seed=settings.seed,
        first_loss=bar.curves["validation"][0][1],
        validation_loss=bar.curves["validation"][-1][1],
        seconds=round(time.perf_counter() - started, 1),
        curves=bar.curves,
    )
    (output / TRAINING_FACTS).write_text(json.dumps(report.to_dict(), indent=2) + "\n", "utf-8")
    return report


def check_output(output: Path):
    """Raise unless a folder can be made there."""
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"{output} already exists; choose another --output")
    parent = next(parent for parent in output.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise UserError(f"{output} cannot be made: {parent} is a file; choose another --output")


def encode(encoder: Tokenizer, text: str) -> np.ndarray:
    return np.array(encoder.encode(text, add_special_tokens=False).ids, dtype=np.uint32)


def uniform_loss(vocab_size: int) -> float:
    """Return the loss of a model that knows nothing: every token equally likely."""
    return math.log(vocab_size)
