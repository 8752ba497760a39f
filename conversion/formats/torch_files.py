"""Find the files that hold a model's weights under other names than usual, among those that training leaves beside."""

import re
import shlex
from collections.abc import Set
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from hf_llama3.errors import UserError, shown

BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
ADAPTER = "adapter_config.json"  # PEFT's
SUFFIXES = (".pt", ".pth", ".bin")
# States of runs, and adapters: no weights of the model.
OTHERS = ("optim*", "sched*", "rng_state*", "random_states*", "recipe_state*", "training_args*", "adapter*", "scaler*")
TORCHTUNE = re.compile(r"(?P<stem>hf_model|meta_model)(?:_(?P<part>\d+))?_(?P<epoch>\d+)\.pt")
TORCHTUNE_ADAPTER = re.compile(r"adapter_(model|\d{1,9})\.pt")
NUMBERED = re.compile(r"(?P<stem>.+)[_-](?P<part>\d{1,9})-of-(?P<total>\d{1,9})(?:_(?P<epoch>\d{1,9}))?\.\w+")


class Found(NamedTuple):
    """The parts of a file's name."""

    path: Path
    stem: str  # common to all parts of a model
    part: int
    total: int | None
    epoch: int | None


def find_parts(
    folder: Path, remedy: str = "move the others elsewhere", suffixes: tuple[str, ...] = SUFFIXES
) -> list[Path]:
    """List the parts of the model in a folder without an index, by default `torch.save`'s; it may be empty.

    Raises:
        UserError: there are several models, or a part of one is missing.
    """
    found = [read_name(path) for path in sorted(folder.iterdir()) if is_weights(path, suffixes)]
    epochs = sorted({one.epoch for one in found if one.epoch is not None})
    if len(epochs) > 1:
        raise UserError(f"{folder} holds the weights of the epochs {epochs}; move those of all but one elsewhere")
    if len({one.stem for one in found}) > 1:
        names = ", ".join(shown(one.path.name, 60) for one in found[:4])
        raise UserError(f"{folder} holds {names}, which have no common name; {remedy}")
    for one in found:
        if one.total is not None and (missing := first_missing({other.part for other in found}, 1, one.total)):
            raise UserError(f"{folder} lacks part {missing} of {one.total} of {shown(one.stem)}; download it")
    return [one.path for one in found]


def first_missing(found: Set[int], first: int, last: int) -> int | None:
    """Return the first number of a range that is not among those found; names may say any number."""
    return next((number for number in range(first, min(last, first + len(found)) + 1) if number not in found), None)


def is_weights(path: Path, suffixes: tuple[str, ...] = SUFFIXES) -> bool:
    return path.suffix in suffixes and path.is_file() and not any(fnmatch(path.name, other) for other in OTHERS)


def find_torchtune_adapters(folder: Path) -> list[Path]:
    """List torchtune's adapters under its own names of tensors: `adapter_0.pt`, by epoch, or `adapter_model.pt`."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else ()
    return [path for path in paths if TORCHTUNE_ADAPTER.fullmatch(path.name)]


def refuse_lone_adapter(folder: Path):
    """Refuse torchtune's adapter where no file says its scale.

    Raises:
        UserError: there is one; the sentence says what to write.
    """
    if (found := find_torchtune_adapters(folder)) and not (folder / ADAPTER).exists():
        content = '{"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA}'
        command = f"echo '{content}' > {shlex.quote(str(folder / ADAPTER))}"
        what = (
            f"{folder} holds {found[0].name}, an adapter of torchtune's, but no {ADAPTER}, which says how it is scaled"
        )
        raise UserError(f"{what}; write it with the lora_rank and lora_alpha of its recipe: {command}")


def read_name(path: Path) -> Found:
    """Parse torchtune's `hf_model_0001_0.pt` and `meta_model_0.pt`, and `NAME-00001-of-00002.bin`."""
    match = NUMBERED.fullmatch(path.name) or TORCHTUNE.fullmatch(path.name)
    if not match:
        return Found(path, path.stem, 1, None, None)
    told = {key: int(value) if value and value.isdigit() else value for key, value in match.groupdict().items()}
    return Found(path, match["stem"], told["part"] or 1, told.get("total"), told["epoch"])
