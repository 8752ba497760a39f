"""The file that `torch.save` wrote before version 1.6, and still does on request: pickles, then storages, and no zip.

Five pickles follow one another: a number that tells the format, its version, the machine, the tensors, and the keys of
the storages; then, for each key, the count of its elements and the elements. Source: torch 2.13.0,
torch/serialization.py, `_legacy_save`.
"""

import io
import pickle
import pickletools
from pathlib import Path

from hf_llama3.errors import UserError, quoted, shown

from .storage import Dtype
from .unpickle import MAX_PICKLE_BYTES, OTHER_SIZES, TensorUnpickler

MAGIC = 0x1950A86A20F9469CFC6C
COUNT_BYTES = 8


def is_unzipped(path: Path) -> bool:
    """Tell such a file, or another pickle, from a zip by its first byte."""
    with open(path, "rb") as file:
        return file.read(1) == pickle.PROTO


def read_unzipped(path: Path):
    """Return the unpickler of the tensors, which has been run, and where each storage lies: {key: (offset, bytes)}.

    Raises:
        UserError: it is another pickle, or damaged.
    """
    with open(path, "rb") as file:
        start = file.read(MAX_PICKLE_BYTES)
        magic, version, machine, tensors, keys = split_pickles(start, path)
        told = [TensorUnpickler(path, one).run() for one in (magic, version, machine, keys)]
        number, _, machine_told, names = told
        if number != MAGIC:
            raise UserError(f"{path} is a pickle, but none of torch.save's; save the model's state_dict by torch.save")
        if not isinstance(machine_told, dict) or not machine_told.get("little_endian", True):
            raise UserError(f"{path} must be little-endian; save it again on this machine")
        unpickler = TensorUnpickler(path, tensors)
        unpickler.run()
        storages, at, end = {}, sum(map(len, (magic, version, machine, tensors, keys))), path.stat().st_size
        for key in names if isinstance(names, list) else []:
            dtype, elements = unpickler.storages.get(key, (None, None)) if isinstance(key, str) else (None, None)
            itemsize = dtype.itemsize if isinstance(dtype, Dtype) else OTHER_SIZES.get(dtype)
            file.seek(at)
            count = int.from_bytes(file.read(COUNT_BYTES), "little")
            if itemsize is None or count != elements:
                raise UserError(f"the storage {quoted(key)} of {path} is damaged or of an unknown type; save it again")
            storages[key] = (at + COUNT_BYTES, count * itemsize)
            at += COUNT_BYTES + count * itemsize
            if at > end:
                raise UserError(f"{path} is truncated at {end} bytes; download it again")
    return unpickler, storages


def split_pickles(start: bytes, path: Path) -> list[bytes]:
    """Cut the five pickles that a file begins with apart.

    Raises:
        UserError: there are not five.
    """
    stream, pickles = io.BytesIO(start), []
    try:
        for _ in range(5):
            begin = stream.tell()
            for _ in pickletools.genops(stream):
                pass
            pickles.append(start[begin : stream.tell()])
    except Exception as error:  # whatever a damaged pickle makes the reader stumble over
        raise UserError(f"{path} is not a readable PyTorch checkpoint ({shown(error)}); download it again") from error
    return pickles
