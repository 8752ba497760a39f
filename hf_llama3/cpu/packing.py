"""Write a folder that starts at once on a CPU: weights are stored as kernels read them, and mapped from the file."""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from hf_llama3.conversion.checkpoint import Checkpoint
from hf_llama3.conversion.config.hf import PACKED, portable_config
from hf_llama3.conversion.formats.safetensors import SafetensorsLayout
from hf_llama3.conversion.formats.storage import Dtype, write_all
from hf_llama3.conversion.formats.writing import reserve
from hf_llama3.conversion.load import LazyTensor
from hf_llama3.conversion.opening import open_checkpoint
from hf_llama3.conversion.plan import DEFAULT_SHARD_SIZE, divide, hf_small_files, parse_size
from hf_llama3.conversion.weights import EMBEDDING, OUTPUT, Row
from hf_llama3.errors import UserError
from hf_llama3.files.atomic import check_target, clear, files_in, finish, place_of, staging, sync, write_files
from hf_llama3.files.progress import byte_bar

from . import QUANTIZATIONS
from .kernels.kernel import Kernel
from .optimization import choose_kernel
from .quantizer import FORMAT, PLAIN, TYPES

PAGE = 4096  # bytes; large tensors begin at multiples of it


@dataclass
class PackReport:
    """Say what was read and written; sizes in bytes."""

    source: str
    target: str
    weights: str  # "bfloat16", "int8" or "int4"
    files: dict[str, int]  # name -> bytes
    bytes: int  # of all files of tensors
    seconds: float
    notes: list[str]

    def to_dict(self) -> dict:
        return asdict(self)


def pack_model(
    source,
    target,
    quantize: str | None = None,
    *,
    rope_factor: float | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> PackReport:
    """Write a checkpoint of any format as a folder whose model is optimised, or quantised, as soon as it is loaded.

    One weight at a time is held in memory. Processes that load the folder share its pages.

    Args:
        source: folder of either format, or a name on the Hub; it is never changed.
        target: folder to make; with `overwrite` an existing one is replaced when the new one is whole.
        quantize: "int8" or "int4", see `optimize`; if omitted, the weights must be bfloat16 and stay exact.

    Raises:
        UserError: for whatever a user can cause; the target is then as it was.
    """
    started = time.perf_counter()
    if quantize not in (None, *QUANTIZATIONS):
        raise UserError(f"--quantize must be one of {QUANTIZATIONS}, got {quantize!r}")
    target, checkpoint = place_of(target), open_checkpoint(source, rope_factor)
    checkpoint.require_language_model()
    if quantize is None and checkpoint.dtype != PLAIN:
        raise UserError(f"weights to pack must be {PLAIN}, got {checkpoint.dtype}; convert --dtype, or add --quantize")
    checkpoint.check_copies()
    files = plan_files(checkpoint, quantize)
    total = sum(file.layout.size for file in files)
    check_target(checkpoint.path.resolve(), target, total, overwrite)
    notes = []
    with staging(target, overwrite) as folder, byte_bar("packing", total, progress) as bar:
        clear(folder)  # of a run that was stopped
        for file in files:
            write_weights(file, folder, checkpoint, quantize, bar.update)
        write_files(folder, small_files(checkpoint, quantize, files, notes))
        sync(folder)
        sizes = {name: path.stat().st_size for name, path in files_in(folder).items()}
    seconds = round(time.perf_counter() - started, 3)
    return PackReport(str(source), str(target), quantize or PLAIN, sizes, total, seconds, notes)


@dataclass
class WeightsFile:
    """One file of weights: its rows of the weight table, and where their tensors lie in it."""

    name: str
    rows: list[Row]
    layout: SafetensorsLayout
    offsets: dict[str, int]  # of each tensor
    largest: int  # bytes of the largest weight that is stored for a kernel


def plan_files(checkpoint: Checkpoint, quantize: str | None) -> list[WeightsFile]:
    """Divide the weights among files; in each, tensors of whole pages come first, so that they begin at a page."""
    # A tied head is stored apart where it is quantised
    rows = checkpoint.rows if quantize else checkpoint.own_rows
    tensors_of = [(row, stored_as(row, LazyTensor(checkpoint, row), quantize)) for row in rows]
    divided = divide(tensors_of, lambda entry: sum(map(num_bytes, entry[1])), parse_size(DEFAULT_SHARD_SIZE))
    files = []
    for name, group in divided.items():
        tensors = [tensor for _, of_row in group for tensor in of_row]
        tensors.sort(key=lambda tensor: num_bytes(tensor) % PAGE != 0)
        layout = SafetensorsLayout(tensors, align=PAGE)
        offsets = {tensor: offset for (tensor, *_), offset in zip(tensors, layout.offsets, strict=True)}
        packed = (of_row for row, of_row in group if of_row[0][0] != row.hf)
        largest = max((sum(map(num_bytes, of_row)) for of_row in packed), default=0)
        files.append(WeightsFile(name, [row for row, _ in group], layout, offsets, largest))
    return files


def stored_as(row: Row, weight: LazyTensor, quantize: str | None) -> list[tuple[str, Dtype, tuple[int, ...]]]:
    """Return name, type and shape of each tensor that a row of the table is stored in."""
    kernel = kernel_of(row, weight.shape, quantize)
    prefix, _, own = row.hf.rpartition(".")  # "weight" or "bias"
    tensors = {own: weight} if kernel is None else kernel.layout(tuple(weight.shape))
    return [
        (f"{prefix}.{key}", TYPES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))
        for key, tensor in tensors.items()
    ]


def kernel_of(row: Row, shape: tuple[int, ...], quantize: str | None) -> type[Kernel] | None:
    """Return the kernel that a weight is stored for, or None where it is stored as it is."""
    if quantize is None or len(shape) != 2 or row.hf == EMBEDDING.hf:
        return None
    return choose_kernel(quantize, is_head=row.hf == OUTPUT.hf)


def num_bytes(tensor: tuple[str, Dtype, tuple[int, ...]]) -> int:
    return math.prod(tensor[2]) * tensor[1].itemsize


def write_weights(file: WeightsFile, folder: Path, checkpoint: Checkpoint, quantize: str | None, progress):
    """Write a file of weights, one row of the table after another; it gets its name when it is whole."""
    partial = folder / f"{file.name}.partial"
    memory = torch.empty(file.largest, dtype=torch.uint8)  # reused, because fresh memory costs page faults
    with open(partial, "wb", buffering=0) as out:
        reserve(out, file.layout.size)
        for row in file.rows:
            weight = LazyTensor(checkpoint, row).read(0, None)
            kernel = kernel_of(row, weight.shape, quantize)
            prefix, _, own = row.hf.rpartition(".")
            stored = {own: weight}
            if kernel is not None:
                stored = lay_out(kernel.layout(tuple(weight.shape)), memory)
                kernel.encode(weight, stored)
            for key, tensor in stored.items():
                content = tensor.contiguous().view(torch.uint8).numpy()
                write_all(out, content, file.offsets[f"{prefix}.{key}"])
                progress(content.nbytes)
        for offset, content in file.layout.fixed([]):
            write_all(out, content, offset)
    finish(partial)


def lay_out(layout: dict[str, torch.Tensor], memory: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the tensors of a layout, one behind the other in memory."""
    sizes = [tensor.nbytes for tensor in layout.values()]
    parts = memory[: sum(sizes)].split(sizes)
    return {
        key: part.view(tensor.dtype).view(tensor.shape)
        for (key, tensor), part in zip(layout.items(), parts, strict=True)
    }


def small_files(checkpoint: Checkpoint, quantize: str | None, files: list[WeightsFile], notes: list[str]):
    """Return the other files by name. The model type is ours: without this package loading ends with an error."""
    config = portable_config(checkpoint.config, checkpoint.dtype, "llama3", checkpoint.more_config)
    del config["auto_map"]  # that code cannot read kernels' tensors
    config["quantization_config"] = {"quant_method": PACKED, "weights": quantize or PLAIN, "format": FORMAT}
    weight_map = {name: file.name for file in files for name in file.offsets}
    return hf_small_files(checkpoint, config, weight_map, sum(file.layout.size for file in files), notes)
