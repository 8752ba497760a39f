"""Complete any number of prompts in batches, in the order of the file, and resume after an interruption."""

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
BATCHES_AT_A_TIME = 4  # batches for each process, among which prompts of similar length are put together
LINES_AT_A_TIME = 1024  # prompts whose lengths are checked together
MOST_OF_A_LINE = 2**20  # characters; a context of 131,072 tokens holds 0.6 million of a usual text


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

    Every process calls this; the first one gets all completions, the others none. The number of processes decides
    which prompts share a batch, and so what is sampled.

    Raises:
        UserError: a number is out of its range, or a prompt does not fit; no prompt is then completed.
    """
    total = check_prompts(model, tokenizer, prompts, job, batch_size, group)
    return complete_from(0, total, model, tokenizer, prompts, job, batch_size, group, progress)


def complete_from(
    first: int, total: int, model, tokenizer, prompts, job: Job, batch_size: int, group: Group, progress: bool
) -> Iterator[Completion]:
    """Complete prompts that are checked already, from number `first` on; see `complete`."""
    lines = itertools.islice(enumerate(read_prompts(prompts)), first, None)
    hidden = not progress or not group.is_first or total == 1
    with bar(total=total, initial=first, desc="generating", unit="prompt", disable=hidden) as shown:
        while block := list(itertools.islice(lines, batch_size * BATCHES_AT_A_TIME * group.shares)):
            found = complete_share(model, tokenizer, block, job, batch_size, group)
            together = [pair for share in group.gather(found) for pair in share]
            yield from (completion for _, completion in sorted(together, key=lambda pair: pair[0]))
            shown.update(len(block))


def complete_share(model, tokenizer, block, job: Job, batch_size: int, group: Group) -> list[tuple[int, Completion]]:
    """Complete this process's share of a block of prompts, in batches of similar length, the longest first."""
    rows = tokenize(tokenizer, [prompt for _, prompt in block])
    tokenized = [(number, prompt, row) for (number, prompt), row in zip(block, rows, strict=True)]
    ordered = sorted(tokenized, key=lambda entry: (-len(entry[2]), entry[0]))
    size = min(batch_size, -(-len(block) // group.shares))  # so that every process gets some of few prompts
    batches = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    found = []
    for batch in batches[group.share :: group.shares]:
        numbers, texts, rows = zip(*batch, strict=True)
        seed = (job.seed + min(numbers)) % 2**32  # or every batch would draw the same random numbers
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
    """Write the completions as lines of JSON; the same call resumes an interrupted run.

    The lines are kept in `OUTPUT.partial/` until the last one is written. Returns a report: the file, the number of
    prompts, and how many an earlier run had completed.

    Raises:
        UserError: the output exists, was begun with other settings, is being written by another run or cannot be
            written; and as `complete` does.
    """
    total = check_prompts(model, tokenizer, prompts, job, batch_size, group)
    how = (model, tokenizer, prompts, job, batch_size, group, progress)
    if not group.is_first:
        list(complete_from(group.share_out(None), total, *how))  # the first process has them
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
    """Check the paths before a model is loaded.

    Raises:
        UserError: the prompts are not a regular file (it is read more than once), or the output exists.
    """
    if prompts is not None and not prompts.is_file():
        what = "a folder or a pipe" if prompts.exists() else "nothing"
        raise UserError(f"--prompts must name a file, got {prompts}, where there is {what}; write one")
    if output is not None and output.exists():
        raise UserError(f"{output} already exists; choose another --output")


def describe(model, prompts: list[str] | Path, job: Job) -> dict:
    """Return all settings that decide what the completions are."""
    sha256 = hash_file(prompts, "sha256", lambda count: None) if isinstance(prompts, Path) else None
    text = None if isinstance(prompts, Path) else prompts
    name, rope = str(Path(model.name_or_path).resolve()), model.config.rope_parameters
    settings = {"model": name, "rope": rope, "dtype": str(model.dtype), "quantize": quantization_of(model)}
    return settings | {"prompts": sha256 or text} | asdict(job)


def begin(folder: Path, settings: dict) -> int:
    """Begin a run in its empty folder, or resume the one in it; return how many completions it has.

    Raises:
        UserError: the run was begun with other settings, or the folder is not one of ours.
    """
    settings_file, first_part = folder / SETTINGS_FILE, folder / f"{SETTINGS_FILE}.partial"
    found = set(folder.iterdir())
    known = {settings_file, folder / LINES_FILE} if settings_file in found else {first_part}  # stopped at once
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
    """Check the numbers and that every prompt fits; return the number of prompts in every process."""
    check_sampling(job.max_new_tokens, job.temperature, job.top_p, job.seed)
    if batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, got {batch_size}")
    return group.share_out(count_prompts(model, tokenizer, prompts, job) if group.is_first else None)


def count_prompts(model, tokenizer, prompts: list[str] | Path, job: Job) -> int:
    """Count the prompts, and check that each fits."""
    total = 0
    for some in group_lines(read_prompts(prompts)):
        rows = tokenize(tokenizer, some)
        check_rows(model, tokenizer, rows)
        lengths = [len(ids) for ids in rows]
        check_lengths(model, max(lengths), job.max_new_tokens)
        check_lengths(model, min(lengths), job.max_new_tokens)
        total += len(some)
    if not total:
        raise UserError("there must be at least one prompt, got none")
    return total


def group_lines(lines: Iterator[str]) -> Iterator[list[str]]:
    """Yield lines a few at a time: as many as have `MOST_OF_A_LINE` characters together, and one that has as many."""
    some, length = [], 0
    for line in lines:
        if some and (len(some) == LINES_AT_A_TIME or length + len(line) > MOST_OF_A_LINE):
            yield some
            some, length = [], 0
        some.append(line)
        length += len(line)
    if some:
        yield some


def read_prompts(prompts: list[str] | Path) -> Iterator[str]:
    """Yield each of some prompts, or each line of a file in UTF-8.

    Raises:
        UserError: it cannot be read, or a line is longer than any model's context.
    """
    if not isinstance(prompts, Path):
        yield from prompts
        return
    try:
        with open(prompts, encoding="utf-8-sig") as file:  # some editors put a mark before the text
            for number in itertools.count(1):
                line = file.readline(MOST_OF_A_LINE + 2)
                if not line:
                    return
                if len(line.removesuffix("\n")) > MOST_OF_A_LINE:
                    rule = f"must be at most {MOST_OF_A_LINE} characters, got more"
                    raise UserError(f"line {number} of {prompts} {rule}; divide it into prompts")
                yield line.removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{prompts} cannot be read: {error}") from error
