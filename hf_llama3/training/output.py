"""The folder of a training run: started, resumed, and at the end a model that every tool loads."""

import contextlib
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError

from hf_llama3.conversion import convert
from hf_llama3.conversion.checkpoint import Checkpoint
from hf_llama3.conversion.config.hf import make_portable
from hf_llama3.conversion.provenance import PROVENANCE
from hf_llama3.errors import UserError, words_of
from hf_llama3.files.atomic import is_taken, parent_of, system_errors, write_files
from hf_llama3.files.facts import CURVES_FILE, TRAINING_FACTS
from hf_llama3.files.json import read_json, to_json
from hf_llama3.files.picture import plot_curves
from hf_llama3.files.reading import require_files

from .data import Text
from .prepare import FOLDER
from .settings import Settings, differences

RUN_FILE = "run.json"  # the settings of an unfinished run
LAST = "config.json"  # what makes a folder loadable


@contextlib.contextmanager
def start_run(output: Path, text: Text, settings: Settings, resume: bool):
    """Make the folder of a run, or check that there is one to resume; a `UserError` in the block removes a new folder.

    Raises:
        UserError: the folder is taken, or belongs to a run of other settings or of another text.
    """
    run = output / RUN_FILE
    if resume and settings.fsdp:
        raise UserError(
            f"--resume needs the optimiser's state, which --fsdp does not keep; go on with --from {output}/checkpoint-N"
        )
    if resume and run.exists():
        require_files(output, "; move it elsewhere")
        facts = read_json(run)
        if others := differences(settings, facts["settings"]):
            raise UserError(f"{output} was begun with another {' and '.join(others)}; give what it was begun with")
        if facts["text_sha256"] != text.sha256:
            raise UserError(
                f"{output} was begun with another text than {text.path}; give that text, or another --output"
            )
        yield
        return
    check_free(output, resume)
    output.mkdir(parents=True, exist_ok=True)
    facts = {"settings": asdict(settings), "text": text.path.name, "text_sha256": text.sha256}
    write_files(output, {RUN_FILE: to_json(facts)})
    try:
        yield
    except UserError:
        shutil.rmtree(output)
        raise


def check_free(output: Path, resume: bool = False):
    """Raise unless a folder can be made there."""
    if is_taken(output) and not has_hardly_begun(output):
        if (output / RUN_FILE).exists():
            raise UserError(
                f"{output} holds an unfinished run; add --resume to go on with it, or choose another --output"
            )
        if resume and (output / LAST).exists():
            raise UserError(f"{output} is finished; choose another --output, or go on with --from {output}")
        raise UserError(f"{output} already exists; choose another --output")
    parent_of(output)


def has_hardly_begun(output: Path) -> bool:
    """Tell whether a run was stopped while it wrote down its settings, before anything else."""
    return output.is_dir() and [path.name for path in output.iterdir()] == [f"{RUN_FILE}.partial"]


def last_checkpoint(output: Path) -> str | None:
    """Return the last whole checkpoint; one that a kill cut short lacks what is written last."""
    found = {}
    for path in output.glob("checkpoint-*"):
        with contextlib.suppress(UserError):
            found[read_json(path / "trainer_state.json")["global_step"]] = str(path)
    return found[max(found)] if found else None


@contextlib.contextmanager
def run_errors(output: Path):
    """Turn errors of the system into one sentence, whichever library raised them."""
    with system_errors(output, "mend that, then add --resume"):
        try:
            yield
        except torch.OutOfMemoryError as error:
            reason = words_of(error)
            remedy = "lower --batch-size, raise --accumulate, or add --checkpointing"
            raise UserError(f"{output} needs more memory than there is ({reason}); {remedy}") from error
        except (SafetensorError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
                raise
            raise OSError(words_of(error)) from error


def finish_run(trainer, output: Path, tokenizer_files: dict[str, bytes], source: Checkpoint | None, report):
    """Write the finished model into the output, its configuration last; every process calls this."""
    staging, is_first = output / "finished.partial", trainer.args.process_index == 0
    model = trainer.accelerator.unwrap_model(trainer.model)
    if is_first:
        shutil.rmtree(staging, ignore_errors=True)  # of a run that was stopped here
    if hasattr(model, "merge_and_unload"):
        if is_first:
            model.save_pretrained(output / "adapter")
        model = model.merge_and_unload()
    if is_first and trainer.settings.fsdp:  # the checkpoint is whole, the model in this process is not
        convert(trainer.state.best_model_checkpoint or last_checkpoint(output), staging, to="hf", verify=False)
        (staging / PROVENANCE).unlink()  # it was made from a text, not from its own checkpoint
    elif is_first:
        model.save_pretrained(staging)
    if is_first:
        write_files(staging, tokenizer_files)
        config = read_json(staging / LAST)
        (staging / LAST).write_bytes(to_json(config | {"use_cache": True}))  # the Trainer switched it off
        make_portable(staging, source and source.generation_config)
        if note := plot_curves(report.curves, staging / CURVES_FILE):
            report.notes.append(note)
        facts = report.to_dict() | {"output": output.resolve().name}  # what is published tells no path
        (staging / TRAINING_FACTS).write_bytes(to_json(facts))
        for path in sorted(staging.iterdir(), key=lambda path: path.name == LAST):
            path.rename(output / path.name)
        staging.rmdir()
        (output / RUN_FILE).unlink()
        shutil.rmtree(output / FOLDER)
    trainer.accelerator.wait_for_everyone()
