"""Plan which layer goes to which device, from sizes alone and as the library would, before anything is loaded."""

import contextlib
import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate.utils import convert_file_size_to_int
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.integrations.accelerate import get_balanced_memory, get_max_memory, infer_auto_device_map

from hf_llama3.configuration_llama3 import Llama3Config
from hf_llama3.conversion.checkpoint import Checkpoint
from hf_llama3.conversion.hub.hollow import described
from hf_llama3.conversion.opening import open_checkpoint
from hf_llama3.errors import UserError, quoted, words_of
from hf_llama3.files.atomic import system_errors
from hf_llama3.files.json import parse_json
from hf_llama3.files.picture import draw_bars

from . import DEVICE_MAPS


@dataclass
class Placement:
    """Where every module of a model goes; a decoder layer is never divided. Sizes are bytes of weights alone."""

    device_map: dict[str, int | str]  # module -> number of a GPU, "cpu" or "disk"
    module_bytes: dict[str, int]  # module -> bytes; a tied weight counts where it comes first
    device_bytes: dict[str, int]
    max_memory: dict[str, int]  # the most that each device may take: as given, or what was free

    def to_dict(self) -> dict:
        return asdict(self)

    def table(self) -> dict[str, str]:
        """Return lines to print: runs of layers on one device, then the devices."""
        lines, runs = {}, []
        for name, device in self.device_map.items():
            layer = re.fullmatch(r"(.*\.layers)\.(\d+)", name)
            if layer and runs and runs[-1]["device"] == device and runs[-1]["stack"] == layer[1]:
                runs[-1] |= {"last": layer[2], "bytes": runs[-1]["bytes"] + self.module_bytes[name]}
            else:
                stack, first = (layer[1], layer[2]) if layer else (None, None)
                size = self.module_bytes[name]
                runs.append({"name": name, "stack": stack, "last": first, "device": device, "bytes": size})
        for run in runs:
            several = run["stack"] and not run["name"].endswith(f".{run['last']}")
            name = f"{run['name']} to {run['last']}" if several else run["name"] or "the whole model"
            lines[name] = f"{run['bytes']:>15,} bytes on {device_name(run['device'])}"
        for device, size in self.device_bytes.items():
            limit = self.max_memory.get(device)
            lines[f"{device} together"] = f"{size:>15,} bytes" + (f" of {limit:,}" if limit is not None else "")
        return lines


def place(
    config: PretrainedConfig,
    dtype: torch.dtype,
    device_map: str = "auto",
    max_memory: dict | None = None,
    offload_folder: Path | None = None,
) -> Placement:
    """Work out a device map for a model of this configuration, as `from_pretrained` would.

    Args:
        device_map: "auto" and "balanced" fill GPUs evenly, "balanced_low_0" spares the first, "sequential" fills one
            after another.
        max_memory: bytes, or a text such as "2GiB", by device (0, 1, ... and "cpu"); what is free, if omitted.
        offload_folder: folder for weights that fit nowhere else.

    Raises:
        UserError: the device map or a size is unknown, or the weights do not fit.
    """
    if device_map not in DEVICE_MAPS:
        raise UserError(f"--device-map must be one of {DEVICE_MAPS}, got {device_map!r}")
    memory = read_memory(max_memory)
    limits = {device_name(device): int(size) for device, size in (memory or get_max_memory()).items()}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    model.tie_weights()
    whole = {"no_split_module_classes": sorted(model._no_split_modules)}
    if device_map != "sequential":
        low = device_map == "balanced_low_0"
        memory = get_balanced_memory(model, max_memory=memory, low_zero=low, **whole)
    else:
        memory = get_max_memory(memory)
    found = infer_auto_device_map(model, max_memory=memory, **whole)
    sizes = sizes_of(model, found)
    placement = Placement(found, sizes, {}, limits)
    for name, device in found.items():
        device = device_name(device)
        placement.device_bytes[device] = placement.device_bytes.get(device, 0) + sizes[name]
    check_room(placement, model, offload_folder)
    return placement


def place_checkpoint(path, rope_factor: float | None, device_map: str, max_memory: dict | None) -> Placement:
    """Work out a device map for a checkpoint of any format; weights that fit nowhere are planned for the disk."""
    with described(path) as folder:
        config, stored = config_and_dtype(open_checkpoint(folder, rope_factor))
    return place(config, stored, device_map, max_memory, Path())


def config_and_dtype(checkpoint: Checkpoint) -> tuple[PretrainedConfig, torch.dtype]:
    """Return the configuration and type that a checkpoint is loaded with: its folder's own, or ours for Meta's format.

    Raises:
        UserError: the library does not take the configuration.
    """
    stored = getattr(torch, checkpoint.dtype)
    if not checkpoint.loads_as_is:
        return Llama3Config.from_dict(checkpoint.config), stored
    try:
        config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
    except Exception as error:  # the library raises many kinds
        reason = f"{type(error).__name__}: {words_of(error)}"
        raise UserError(f"{checkpoint.path}/config.json cannot be loaded ({reason}); mend it") from error
    return config, config.dtype or stored


def read_memory(given: dict | str | None) -> dict | None:
    """Turn sizes by device, or a JSON text of them, into bytes by device.

    Raises:
        UserError: it is neither.
    """
    example = json.dumps({"0": "20GiB", "cpu": "60GiB"})
    wanted = f"--max-memory must be sizes by device, as '{example}', got {quoted(given)}"
    try:
        sizes = parse_json(given.encode("utf-8", "surrogatepass")) if isinstance(given, str) else given
        if sizes is None:
            return None
        memory = {}
        for device, size in sizes.items():
            memory[int(device) if str(device).isdigit() else device] = convert_file_size_to_int(size)
    except (ValueError, AttributeError, TypeError, OverflowError) as error:
        raise UserError(wanted) from error
    if any(isinstance(device, str) and device not in ("cpu", "mps") for device in memory) or not memory:
        raise UserError(wanted)
    gpus = sorted(device for device in memory if isinstance(device, int))
    if gpus != list(range(len(gpus))):
        raise UserError(f"--max-memory must number GPUs from 0, got {gpus}; give those that are to be spared 0")
    return memory


def sizes_of(model, device_map: dict) -> dict[str, int]:
    """Return the bytes of parameters of every module in a device map; a tied weight counts where it comes first."""
    sizes = Counter(dict.fromkeys(device_map, 0))
    for name, parameter in model.named_parameters():
        owner = next(prefix for prefix in device_map if not prefix or f"{name}.".startswith(f"{prefix}."))
        sizes[owner] += parameter.nbytes
    return dict(sizes)


def check_room(placement: Placement, model, offload_folder: Path | None):
    """Check that the devices have room for a plan.

    Raises:
        UserError: they do not.
    """
    total, on_disk = sum(placement.device_bytes.values()), placement.device_bytes.get("disk", 0)
    there = ", ".join(f"{size} on {device}" for device, size in placement.max_memory.items())
    if on_disk and offload_folder is None:
        raise UserError(
            f"the model needs {total} bytes, but may take {there}; raise --max-memory, or add --offload-folder DIR"
        )
    layer = max(
        sum(parameter.nbytes for parameter in module.parameters())
        for module in model.modules()
        if type(module).__name__ in model._no_split_modules
    )
    if on_disk and max(placement.max_memory.values()) < layer:
        raise UserError(f"a decoder layer needs {layer} bytes, but the model may take {there}; raise --max-memory")


def device_name(device) -> str:
    return f"gpu {device}" if isinstance(device, int) else str(device)


def check_here(placement: Placement, offload_folder: Path | None):
    """Check that this machine has the devices of a plan and, for an `offload_folder`, the room on disk.

    Raises:
        UserError: it does not.
    """
    gpus = torch.accelerator.device_count()
    for device in placement.device_map.values():
        if (isinstance(device, int) and device >= gpus) or (device == "mps" and not torch.mps.is_available()):
            raise UserError(
                f"--max-memory gives layers to {device_name(device)}, but this machine has {gpus} GPUs; leave it out"
            )
    needed = placement.device_bytes.get("disk", 0)
    if needed and offload_folder is not None and (free := shutil.disk_usage(offload_folder).free) < needed:
        raise UserError(f"--offload-folder {offload_folder} needs {needed} bytes, but its disk has {free} free")


@contextlib.contextmanager
def offload_into(folder: Path | None) -> Iterator[Path | None]:
    """Make a new folder in `folder`, so that nothing old is ever read, and remove it afterwards.

    Raises:
        UserError: it cannot be made.
    """
    if folder is None:
        yield None
        return
    with system_errors(folder, "choose another --offload-folder"):
        folder.mkdir(parents=True, exist_ok=True)
        own = tempfile.TemporaryDirectory(dir=folder, prefix="offload-")
    with own as name:
        yield Path(name)


def plot_placement(placement: Placement, path: Path) -> str | None:
    """Draw the bytes on each device and its limit; where matplotlib is missing, return a note instead.

    Raises:
        UserError: the picture cannot be written.
    """
    bars = {device: [] for device in placement.device_bytes}
    for name, device in placement.device_map.items():
        bars[device_name(device)].append(placement.module_bytes[name] / 2**30)
    limits = {device: size / 2**30 for device, size in placement.max_memory.items()}
    label = "GiB of weights, a stripe for each module; red: what the device may take"
    return draw_bars(bars, label, path, limits)
