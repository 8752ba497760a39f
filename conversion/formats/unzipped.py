"""The format of `torch.save` before version 1.6, which it still writes on request: pickles and storages, no zip.

Five pickles follow one another: a number that tells the format, its version, the machine, the tensors, and the keys of
the storages; then, for each key, the count of its elements and the elements. Source: torch 2.13.0,
torch/serialization.py, `_legacy_save`.
"""

import pickle
from pathlib import Path

from hf_llama3.errors import UserError, quoted, shown

from .storage import BY_STORAGE
from .unpickle import MAX_PICKLE_BYTES, Damaged, Forbidden, Read, forbidden, read_pickle

MAGIC = 0x1950A86A20F9469CFC6C
VERSION = 1001
COUNT_BYTES = 8
SIZES = {"LongStorage": 8, "IntStorage": 4, "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1}
SIZES |= {"BoolStorage": 1, "ComplexFloatStorage": 8, "ComplexDoubleStorage": 16}
SIZES |= {name: dtype.itemsize for name, dtype in BY_STORAGE.items()}


def is_unzipped(path: Path) -> bool:
    """Tell such a file, or any pickle, from a zip by its first byte."""
    with open(path, "rb") as file:
        return file.read(1) == pickle.PROTO


def read_unzipped(path: Path) -> tuple[Read, dict[str, tuple[int, int]]]:
    """Return the value of the pickle of tensors, and the place of each storage: {key: (offset, bytes)}.

    Raises:
        UserError: it is another pickle, or damaged.
    """
    with open(path, "rb") as file:
        magic, version, machine, tensors, keys = read_pickles(file.read(MAX_PICKLE_BYTES), path)
        if magic.value != MAGIC:
            raise UserError(f"{path} is a pickle, but none of torch.save's; save the model's state_dict by torch.save")
        if version.value != VERSION:
            raise UserError(
                f"{path} must be of version {VERSION} of its format, got {quoted(version.value)}; save it again"
            )
        if type(machine.value) is not dict or machine.value.get("little_endian", True) is not True:
            raise UserError(f"{path} must be little-endian; save it again on this machine")
        storages, at, end = {}, keys.end, path.stat().st_size
        for key in keys.value if type(keys.value) is list else []:
            storage = tensors.storages.get(key) if type(key) is str and key not in storages else None
            itemsize = SIZES.get(storage.kind.name) if storage else None
            file.seek(at)
            count = int.from_bytes(file.read(COUNT_BYTES), "little")
            if itemsize is None or count != storage.elements or not storage.is_view:
                raise UserError(f"the storage {quoted(key)} of {path} is damaged or of an unknown type; save it again")
            storages[key] = (at + COUNT_BYTES, count * itemsize)
            at += COUNT_BYTES + count * itemsize
            if at > end:
                raise UserError(f"{path} is truncated at {end} bytes; download it again")
    return tensors, storages


def read_pickles(start: bytes, path: Path) -> list[Read]:
    """Read the five pickles at the beginning of a file.

    Raises:
        UserError: there are not five.
    """
    found = [Read(None, 0, {})]
    try:
        for _ in range(5):
            found.append(read_pickle(start, found[-1].end))
    except Forbidden as error:
        raise forbidden(path, error) from error
    except (Damaged, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a readable PyTorch checkpoint ({shown(error)}); download it again") from error
    return found[1:]
