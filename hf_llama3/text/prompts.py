"""Prompts of any number, completed a few at a time, in the order of the file, gone on with after an interruption."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from hf_llama3.cpu.optimization import quantization_of
from hf_llama3.distributed.parallel import Group
from hf_llama3.errors import UserError, words_of
from hf_llama3.files.atomic import in_the_way, sync, system_errors, write_files
from hf_llama3.files.hashes import hash_file
from hf_llama3.files.json import read_json, to_json
from hf_llama3.files.locking import locked
from hf_llama3.files.progress import bar

from .completion import Completion, check_lengths, check_rows, check_sampling, generate_rows, tokenize

SETTINGS_FILE, LINES_FILE = "settings.json", "completions.jsonl"
BATCHES_AT_A_TIME = 4  # for each process: among so many prompts those of like length are put together
LINES_AT_A_TIME = 1024  # whose lengths are looked at together


@dataclass
class Job:
    """What to generate; the fields are options of `generate_text`."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: list[str] | None = None


def complete(
    model, tokenizer, prompts: list[str] | Path, job: Job, batch_size: int, group: Group, progress: bool
) -> Iterator[Completion]:
    """Yield the completions of prompts, or of each line of a file, in their order.

    Every process calls this; the first one is given all completions, the others none. Which prompts stand in a batch
    together, and so what is sampled, depends on how many processes there are.

    Raises:
        UserError: a prompt does not fit, before any is completed, or a number is out of its range.
    """
    total = check_prompts(model, tokenizer, prompts, job, batch_size, group)
    return complete_from(0, total, model, tokenizer, prompts, job, batch_size, group, progress)


def complete_from(
    first: int, total: int, model, tokenizer, prompts, job: Job, batch_size: int, group: Group, progress: bool
) -> Iterator[Completion]:
    """Do what `complete` does for checked prompts from number `first` on."""
    lines = itertools.islice(enumerate(read_prompts(prompts)), first, None)
    hidden = not progress or not group.is_first or total == 1
    with bar(total=total, initial=first, desc="generating", unit="prompt", disable=hidden) as shown:
        while block := list(itertools.islice(lines, batch_size * BATCHES_AT_A_TIME * group.shares)):
            found = complete_share(model, tokenizer, block, job, batch_size, group)
            together = [pair for share in group.gather(found) for pair in share]
            yield from (completion for _, completion in sorted(together, key=lambda pair: pair[0]))
            shown.update(len(block))


def complete_share(model, tokenizer, block, job: Job, batch_size: int, group: Group) -> list[tuple[int, Completion]]:
    """Complete this process's share of numbered prompts: batches of like length, the longest dealt out first."""
    rows = tokenize(tokenizer, [prompt for _, prompt in block])
    tokenized = [(number, prompt, row) for (number, prompt), row in zip(block, rows, strict=True)]
    ordered = sorted(tokenized, key=lambda entry: (-len(entry[2]), entry[0]))
    size = min(batch_size, -(-len(block) // group.shares))  # of few prompts everyone gets some
    batches = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    found = []
    for batch in batches[group.share :: group.shares]:
        numbers, texts, rows = zip(*batch, strict=True)
        seed = (job.seed + min(numbers)) % 2**32  # or every batch would be sampled by the same chances
        try:
            completions = generate_rows(
                model, tokenizer, texts, rows, job.max_new_tokens, job.temperature, job.top_p, seed, job.stop
            )
        except torch.OutOfMemoryError as error:
            needed = f"{len(texts)} prompts need more memory than there is ({words_of(error)})"
            raise UserError(f"{needed}; lower --batch-size or --max-new-tokens") from error
        found += zip(numbers, completions, strict=True)
    return found


def complete_into(
    output: Path, model, tokenizer, prompts: list[str] | Path, job: Job, batch_size: int, group: Group, progress: bool
) -> dict:
    """Write the completions as lines of JSON; what an interrupted run of the same wrote is gone on with.

    The lines stand in `OUTPUT.partial/` until the last is there. Returns what to report: file, prompts, and how many
    of them an earlier run had completed.

    Raises:
        UserError: the output exists, was begun with something else, is being written by another run or cannot be; and
            as `complete` does.
    """
    total = check_prompts(model, tokenizer, prompts, job, batch_size, group)
    how = (model, tokenizer, prompts, job, batch_size, group, progress)
    if not group.is_first:
        list(complete_from(group.share_out(None), total, *how))  # none: the first process has them
        return {}
    folder = output.with_name(f"{output.name}.partial")
    with system_errors(folder), locked(folder, output):
        check_paths(None, output)
        lines = folder / LINES_FILE
        done = group.share_out(begin(folder, describe(model, prompts, job)))
        with open(lines, "a", encoding="utf-8", buffering=1) as file:
            for completion in complete_from(done, total, *how):
                file.write(json.dumps(completion.to_dict(), ensure_ascii=False) + "\n")
        sync(lines)
        lines.rename(output)
        (folder / SETTINGS_FILE).unlink()
        folder.rmdir()
    return {"output": str(output), "prompts": total, "completed_earlier": done}


def check_paths(prompts: Path | None, output: Path | None):
    """Refuse, before a model is loaded, what no model will mend.

    Raises:
        UserError: the prompts are no file, which is read more than once, or the output exists.
    """
    if prompts is not None and not prompts.is_file():
        what = "a folder or a pipe" if prompts.exists() else "nothing"
        raise UserError(f"--prompts must name a file, got {prompts}, where there is {what}; write one")
    if output is not None and output.exists():
        raise UserError(f"{output} already exists; choose another --output")


def describe(model, prompts: list[str] | Path, job: Job) -> dict:
    """Say what completions follow from."""
    sha256 = hash_file(prompts, "sha256", lambda count: None) if isinstance(prompts, Path) else None
    text = None if isinstance(prompts, Path) else prompts
    name, rope = str(Path(model.name_or_path).resolve()), model.config.rope_parameters
    settings = {"model": name, "rope": rope, "dtype": str(model.dtype), "quantize": quantization_of(model)}
    return settings | {"prompts": sha256 or text} | asdict(job)


def begin(folder: Path, settings: dict) -> int:
    """Begin in the empty folder of a run, or go on with what is in it; return how many completions there are.

    Raises:
        UserError: what is in it was begun with other settings, or by somebody else.
    """
    settings_file, first_part = folder / SETTINGS_FILE, folder / f"{SETTINGS_FILE}.partial"
    found = set(folder.iterdir())
    known = {settings_file, folder / LINES_FILE} if settings_file in found else {first_part}  # stopped as it began
    if not found <= {first_part, *known} or not all(path.is_file() and not path.is_symlink() for path in found):
        raise in_the_way(folder)
    if settings_file not in found:
        write_files(folder, {SETTINGS_FILE: to_json(settings)})
        return 0
    begun = read_json(folder / SETTINGS_FILE)
    if others := sorted(key for key in settings if begun.get(key) != settings[key]):
        raise UserError(f"{folder} was begun with another {' and '.join(others)}; give the same, or remove it")
    return drop_torn_line(folder / LINES_FILE)


def drop_torn_line(path: Path) -> int:
    """Cut a file after its last whole line and return how many there are."""
    lines, end = 0, 0
    with open(path, "ab+") as file:
        file.seek(0)
        for line in file:
            if line.endswith(b"\n"):
                lines, end = lines + 1, end + len(line)
        file.truncate(end)
    return lines


def check_prompts(model, tokenizer, prompts, job: Job, batch_size: int, group: Group) -> int:
    """Raise unless numbers are in their ranges and every prompt fits, and return how many there are, to all."""
    check_sampling(job.max_new_tokens, job.temperature, job.top_p, job.seed)
    if batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, got {batch_size}")
    return group.share_out(count_prompts(model, tokenizer, prompts, job) if group.is_first else None)


def count_prompts(model, tokenizer, prompts: list[str] | Path, job: Job) -> int:
    """Return how many prompts there are, of which each fits."""
    lines, total = read_prompts(prompts), 0
    while some := list(itertools.islice(lines, LINES_AT_A_TIME)):
        rows = tokenize(tokenizer, some)
        check_rows(model, tokenizer, rows)
        lengths = [len(ids) for ids in rows]
        check_lengths(model, max(lengths), job.max_new_tokens)
        check_lengths(model, min(lengths), job.max_new_tokens)
        total += len(some)
    if not total:
        raise UserError("there must be at least one prompt, got none")
    return total


def read_prompts(prompts: list[str] | Path) -> Iterator[str]:
    """Yield each of some prompts, or each line of a file in UTF-8.

    Raises:
        UserError: it cannot be read.
    """
    if not isinstance(prompts, Path):
        yield from prompts
        return
    try:
        with open(prompts, encoding="utf-8") as file:
            for line in file:
                yield line.removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{prompts} cannot be read: {error}") from error
