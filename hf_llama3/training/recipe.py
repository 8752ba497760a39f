"""Training on a text, from top to bottom: data, tokenizer, model, optimiser, loop, report.

The loop is `transformers.Trainer`: devices, processes, accumulation, clipping, schedules, saving and resuming are its
work. The result is a portable folder that every tool reads.
"""

import contextlib
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from packaging.version import Version
from transformers import TrainingArguments, set_seed
from transformers.distributed import DistributedConfig
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from hf_llama3.configuration_llama3 import Llama3Config
from hf_llama3.conversion.config.params import feed_forward_size
from hf_llama3.cpu import processor
from hf_llama3.distributed.parallel import check_devices
from hf_llama3.errors import UserError, one_line
from hf_llama3.modeling_llama3 import Llama3ForCausalLM

from .data import ConsecutiveWindows, ShuffledWindows, survey
from .dropout import add_residual_dropout
from .output import finish_run, last_checkpoint, run_errors, start_run
from .prepare import FOLDER, prepare, read_prepared
from .settings import Settings
from .source import add_adapters, load_source, open_source
from .trainer import ProgressBar, TextTrainer, WholeCheckpoints

SAMPLE_TOKENS = 100
FSDP_SINCE = "5.23.0"  # of transformers, whose Trainer takes a model that was divided while it was loaded
RESUME_SINCE = "5.23.0"  # of transformers: 5.17.0 looks for a device "cpu:0" where several processes share a CPU
LOGS = 100  # of the loss, over a run


@dataclass
class TrainingReport:
    """Describe what was trained and how well; losses are in nats per token."""

    output: str
    text: str
    source: str | None  # the model that it went on from
    tokens: int  # of the training part
    vocab_size: int
    num_parameters: int
    context: int
    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    first_loss: float  # on the validation part, before training
    validation_loss: float  # of the best checkpoint, which is what is kept
    best_step: int
    test_loss: float | None  # where a part was set aside
    tokens_per_second: float  # while training, evaluations and all
    seconds: float
    curves: dict[str, list[tuple[int, float]]]
    notes: list[str]

    def to_dict(self) -> dict:
        return asdict(self)


def train(
    text,
    output,
    settings: Settings = Settings(),  # noqa: B008
    resume: bool = False,
    progress: bool = False,
) -> TrainingReport:
    """Train a Llama 3 on a text and leave a model folder in `output`.

    Under torchrun, all processes call this, each computes its share of every step, and the first one writes.

    Args:
        text: file in UTF-8, of any size; its first part trains, the rest validates.
        output: folder to make; checkpoints lie in `output/checkpoint-N` until it is finished, and after.
        resume: continue from the last checkpoint of an interrupted run with the same settings.
        progress: show bars and notes on standard error.

    Raises:
        UserError: the text cannot be read or is too short, the output exists, the shape is impossible, the loss is no
            longer a number, or the system refuses to write.
    """
    started, text, output = time.perf_counter(), Path(text), Path(output)
    arguments = make_arguments(output, settings)
    is_old = Version(transformers.__version__) < Version(RESUME_SINCE)
    if resume and is_old and arguments.world_size > 1 and arguments.device.type == "cpu":
        needed = f"--resume in several processes on a CPU needs transformers {RESUME_SINCE} or newer"
        raise UserError(f"{needed}, got {transformers.__version__}; upgrade it, or go on in one")
    is_first, progress = arguments.process_index == 0, progress and arguments.process_index == 0
    if progress and (note := slow_bfloat16(arguments)):
        print(f"Note: {one_line(note)}", file=sys.stderr, flush=True)
    source = source_tokenizer = None
    if settings.source is not None:
        source, source_tokenizer = open_source(settings.source, settings.context)

    # Data and tokenizer: the first process writes them, all map the same files
    with run_errors(output), arguments.main_process_first(local=False):
        if is_first:
            surveyed = survey(text, progress)
            with start_run(output, surveyed, settings, resume):
                prepare(surveyed, output, settings, source_tokenizer, progress)
                if source is None:
                    config = make_config(read_prepared(output).tokenizer.vocabulary, settings).to_dict()
                else:
                    config = source.config
                if settings.fsdp:
                    check_rows(config, arguments.world_size)
        prepared = read_prepared(output)
    tokenizer, context = prepared.tokenizer, settings.context
    checkpoint = last_checkpoint(output) if resume else None

    # Model
    set_seed(settings.seed)
    if source is None:
        model = Llama3ForCausalLM(make_config(tokenizer.vocabulary, settings))
    else:
        model = load_source(source, settings.dropout)
    num_parameters, vocab_size = model.num_parameters(), model.config.vocab_size
    if settings.fsdp:
        with run_errors(output):
            model = shard_among_processes(model, output, arguments)
    if settings.dropout:
        add_residual_dropout(model, settings.dropout)
    model.skip_logits_in_training = True
    if settings.checkpointing:
        model.gradient_checkpointing_enable()
    if settings.lora is not None:
        model = add_adapters(model, settings.lora)

    # Optimiser (see `TextTrainer.create_optimizer`) and loop
    together = arguments.world_size * arguments.eval_batch_size
    trainer = TextTrainer(
        model,
        arguments,
        settings=settings,
        train_dataset=ShuffledWindows(prepared.training, context, settings.steps * settings.batch_size, settings.seed),
        eval_dataset=ConsecutiveWindows(prepared.validation, context, together),
        callbacks=[WholeCheckpoints(tokenizer.files)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(
        ProgressBar(settings.batch_size * context, lambda: draw_sample(trainer, prepared, settings), progress)
    )
    arguments.eval_on_start = checkpoint is None
    steps_done = int(Path(checkpoint).name.partition("-")[2]) if checkpoint else 0
    training_started = time.perf_counter()
    with run_errors(output), quiet():
        trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - training_started

    # Report
    test_loss = None
    if len(prepared.test):
        windows = ConsecutiveWindows(prepared.test, context, together)
        test_loss = trainer.evaluate(windows, metric_key_prefix="test")["test_loss"]
    curves = read_curves(trainer.state.log_history)
    best_step, best_loss = min(curves["validation"][1:], key=lambda point: point[1])  # the first has no checkpoint
    report = TrainingReport(
        output=str(output),
        text=text.name,
        source=source and source.name,
        tokens=len(prepared.training),
        vocab_size=vocab_size,
        num_parameters=num_parameters,
        context=context,
        steps=settings.steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        seed=settings.seed,
        first_loss=curves["validation"][0][1],
        validation_loss=best_loss,
        best_step=best_step,
        test_loss=test_loss,
        tokens_per_second=round((settings.steps - steps_done) * settings.batch_size * context / seconds, 1),
        seconds=round(time.perf_counter() - started, 1),
        curves=curves,
        notes=[],
    )
    with run_errors(output), quiet():
        finish_run(trainer, output, tokenizer.files, source, report)
    return report


@contextlib.contextmanager
def quiet():
    """Silence the library's own progress bars and hints."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def make_arguments(output: Path, settings: Settings) -> TrainingArguments:
    """Translate the settings into the Trainer's arguments; this also joins the processes that torchrun started.

    Raises:
        UserError: the processes have too few devices or cannot share the windows of a step evenly, or the library is
            too old for --fsdp.
    """
    if settings.fsdp and Version(transformers.__version__) < Version(FSDP_SINCE):
        raise UserError(f"--fsdp needs transformers {FSDP_SINCE} or newer, got {transformers.__version__}; upgrade it")
    check_devices()
    on_gpu = torch.cuda.is_available()
    eval_every = settings.eval_every or max(settings.steps // 10, 1)
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=settings.steps,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(settings.warmup * settings.steps),
        max_grad_norm=1.0,
        bf16=on_gpu and torch.cuda.is_bf16_supported() if settings.bf16 is None else settings.bf16,
        use_cpu=not on_gpu and not torch.backends.mps.is_available(),
        torch_compile=settings.compile,
        ddp_find_unused_parameters=False,
        eval_strategy="steps",
        eval_steps=eval_every,
        save_strategy="steps",
        save_steps=eval_every,
        save_only_model=settings.fsdp,  # the library does not gather the optimiser's state
        save_total_limit=2,  # the best and the last
        load_best_model_at_end=not settings.fsdp,  # then the best checkpoint's files are taken
        metric_for_best_model="eval_loss",
        logging_steps=max(settings.steps // LOGS, 1),
        logging_nan_inf_filter=False,  # show a loss that is not finite
        train_sampling_strategy="sequential",  # the windows are in random order
        remove_unused_columns=False,  # or `shift_labels` is, and the model shifts the labels a second time
        dataloader_pin_memory=on_gpu,
        disable_tqdm=True,
        ddp_timeout=7 * 24 * 3600,  # the first process may take long over a large text
        report_to=[],
        seed=settings.seed,
        data_seed=settings.seed,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one process takes one device; torchrun starts more processes
    if settings.fsdp and arguments.world_size == 1:
        raise UserError("--fsdp divides a model among processes, got 1; start it by torchrun --nproc-per-node N")
    shares = arguments.world_size * settings.accumulate
    if settings.batch_size % shares:
        raise UserError(
            f"--batch-size must be a multiple of processes x --accumulate, got {settings.batch_size} and "
            f"{arguments.world_size} x {settings.accumulate}"
        )
    arguments.per_device_train_batch_size = arguments.per_device_eval_batch_size = settings.batch_size // shares
    return arguments


def slow_bfloat16(arguments: TrainingArguments) -> str | None:
    """Return a note if bfloat16 is slower than float32 on this processor."""
    if not arguments.bf16 or arguments.device.type != "cpu" or processor.here().multiplies_bfloat16:
        return None
    return f"--bf16 is slower than float32 on this processor, {processor.here()}; leave it out to go faster"


def make_config(vocabulary: dict, settings: Settings) -> Llama3Config:
    """Describe a model of the given shape; its output head is its embedding.

    Raises:
        UserError: there is no such shape.
    """
    width = settings.hidden_size
    try:
        return Llama3Config(
            **vocabulary,
            hidden_size=width,
            intermediate_size=settings.intermediate_size or feed_forward_size(width, 32, None),
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.kv_heads,
            max_position_embeddings=settings.context,
            attention_dropout=settings.dropout,
            tie_word_embeddings=True,
        )
    except (StrictDataclassError, ValueError) as error:
        raise UserError(f"no model has this shape: {error.__cause__ or error}") from error


def check_rows(config: dict, processes: int):
    """Check that processes hold equal parts of an embedding that is the head as well.

    Of unequal ones torch 2.13 (`FSDPParam.reset_sharded_param`) pads the shorter once for each of both names, and what
    the optimiser changes then reaches only one of them: the head stays as it began.

    Raises:
        UserError: they do not.
    """
    rows = config["vocab_size"]
    if config["tie_word_embeddings"] and rows % processes:
        remedy = "start a number of processes that divides them, choose another --tokenizer, or leave out --fsdp"
        raise UserError(f"--fsdp needs equal parts of the {rows} tokens' rows, got {processes} processes; {remedy}")


def shard_among_processes(model: Llama3ForCausalLM, output: Path, arguments: TrainingArguments) -> Llama3ForCausalLM:
    """Return the model with its weights sharded (FSDP2); the library shards them while it loads a folder."""
    folder = output / FOLDER / "model"
    with arguments.main_process_first(local=False), quiet():
        if arguments.process_index == 0:
            model.save_pretrained(folder)
    config = DistributedConfig(fsdp_size=arguments.world_size)
    return Llama3ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, distributed_config=config, trust_remote_code=False
    )


def draw_sample(trainer: TextTrainer, prepared, settings: Settings) -> str:
    """Generate a sample after the first tokens of the validation text, without using training's random numbers."""
    if settings.fsdp:
        return "(no sample: the weights are divided among processes)"
    prompt = torch.tensor(prepared.validation[:8].astype("int64"), device=trainer.args.device)[None]
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(settings.seed)
        room = settings.context - prompt.shape[1]
        ids = trainer.model.generate(
            prompt, max_new_tokens=max(min(SAMPLE_TOKENS, room), 1), do_sample=True, temperature=0.8, use_cache=True
        )
    return prepared.tokenizer.decode(ids[0].tolist())


def read_curves(history: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """Collect (step, loss in nats per token) from the Trainer's log."""
    keys = {"training": "loss", "validation": "eval_loss"}
    return {name: [(log["step"], log[key]) for log in history if key in log] for name, key in keys.items()}
