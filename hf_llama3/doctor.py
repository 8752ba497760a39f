"""What is installed and what this machine has, with the command to type where something is missing."""

import os
import platform
import shutil
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from .cpu import processor
from .errors import without_password, words_of

PACKAGE = "hf_llama3"

# Extra -> what it is for; the others are for those who work on this package
EXTRAS = {
    "plot": "pictures: curves of training, --plot",
    "gguf": "GGUF files with quantised weights",
    "llama2": "tokenizers of Llama 2 and Code Llama",
    "peft": "adapters: train --lora",
}


@dataclass
class Report:
    """Describe the installation and the machine; sizes in bytes."""

    versions: dict[str, str | None]  # of Python, this package and those it requires
    required: dict[str, str]  # package -> what its version must be
    extras: dict[str, bool]  # whether all is there that they bring
    devices: list[dict]
    cpu: dict
    memory: dict[str, int | None]
    disk: dict[str, dict]
    hub: dict
    problems: list[str]  # sentences; without one, everything that is needed is there
    advice: list[str]  # what may be added

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict:
        return {"ok": self.ok} | asdict(self)

    def table(self) -> dict[str, str]:
        """Return lines to print."""
        lines = {}
        for name, version in self.versions.items():
            wanted = f" (needed: {self.required[name]})" if self.required.get(name) else ""
            lines[name.replace("_", "-")] = (version or "missing") + wanted
        for extra, there in self.extras.items():
            lines[f"extra {extra}"] = f"{'installed' if there else 'missing'} ({EXTRAS[extra]})"
        for index, device in enumerate(self.devices):
            lines[f"device {index}"] = f"{device['kind']}, {device['name']}, {free_of(device)}"
        if not self.devices:
            lines["device"] = "the CPU; torch finds no other"
        threads = f"threads of torch: {self.cpu['threads'] or 'unknown'}"
        lines["CPU"] = f"{self.cpu['name']}, {self.cpu['cores']} cores, {threads}"
        lines["instructions"] = ", ".join(self.cpu["instructions"]) or "unknown"
        lines["memory"] = free_of(self.memory)
        lines |= {f"disk, {place}": f"{free_of(disk)}, {disk['path']}" for place, disk in self.disk.items()}
        offline = ", offline (HF_HUB_OFFLINE)" if self.hub["offline"] else ""
        lines["Hub"] = f"{self.hub['endpoint'] or 'unknown'}{offline}, {'a' if self.hub['token'] else 'no'} token"
        return lines


def examine() -> Report:
    """Examine the installation and the machine; nothing is downloaded or changed."""
    requirements = [Requirement(line) for line in metadata.requires(PACKAGE)]
    required = [one for one in requirements if applies(one)]
    problems = [sentence for one in required if (sentence := problem_of(one))]
    extras, advice = {}, []
    for extra, purpose in EXTRAS.items():
        extras[extra] = not any(problem_of(one) for one in requirements if applies(one, extra) and not applies(one))
        if not extras[extra]:
            advice.append(f'for {purpose}, pip install "{PACKAGE}[{extra}]"')
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library that it is linked with is missing
        torch = None
        if version_of("torch"):
            problems.append(f"torch cannot be imported ({words_of(error)}); install it again")
    hub, cache = examine_hub()
    return Report(
        versions={"Python": platform.python_version(), PACKAGE: metadata.version(PACKAGE)}
        | {one.name: version_of(one.name) for one in required},
        required={one.name: str(one.specifier) for one in required},
        extras=extras,
        devices=examine_devices(torch) if torch else [],
        cpu=examine_cpu(torch),
        memory=examine_memory(),
        disk={"here": examine_disk(Path.cwd())} | ({"hub_cache": examine_disk(cache)} if cache else {}),
        hub=hub,
        problems=problems,
        advice=advice,
    )


def applies(requirement: Requirement, extra: str = "") -> bool:
    """Tell whether a requirement applies to this machine, with an extra or without one."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def version_of(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def problem_of(requirement: Requirement) -> str | None:
    """Return why a requirement is not met, in one sentence, or None."""
    version, wanted = version_of(requirement.name), f"{requirement.name}{requirement.specifier}"
    if version is None:
        return f'{requirement.name} is missing; pip install "{wanted}"'
    if not requirement.specifier.contains(version, prereleases=True):
        return f'{requirement.name} must be {requirement.specifier}, got {version}; pip install "{wanted}"'
    return None


def examine_devices(torch) -> list[dict]:
    """List the accelerators that torch can use."""
    if not torch.accelerator.is_available():
        return []
    kind, devices = torch.accelerator.current_accelerator().type, []
    for index in range(torch.accelerator.device_count()):
        if kind == "mps":  # shares the machine's memory
            name, free, total = torch.backends.mps.get_name(), None, torch.mps.recommended_max_memory()
        else:
            name = torch.get_device_module(kind).get_device_name(index)
            free, total = torch.accelerator.get_memory_info(index)
        shown = "ROCm" if torch.version.hip else kind.upper()
        devices.append({"kind": shown, "name": name, "free": free, "total": total})
    return devices


def examine_cpu(torch) -> dict:
    """Describe the processor; its instructions and threads only if torch is installed."""
    found = {"name": processor.name_here(), "cores": processor.cores(), "threads": None, "instructions": []}
    if torch is None:
        return found
    return found | {"threads": processor.threads(), "instructions": list(processor.here().instructions)}


def examine_memory() -> dict[str, int | None]:
    try:
        import psutil  # accelerate brings it
    except ImportError:
        return {"free": None, "total": None}
    memory = psutil.virtual_memory()
    return {"free": memory.available, "total": memory.total}


def examine_disk(path: Path) -> dict:
    """Measure the disk on which a folder lies, or will lie."""
    there = next(place for place in (path, *path.parents) if place.exists())
    usage = shutil.disk_usage(there)
    return {"path": str(path), "free": usage.free, "total": usage.total}


def examine_hub() -> tuple[dict, Path | None]:
    """Describe the settings of the Hub without connecting to it; also return its cache folder."""
    try:
        from huggingface_hub import constants
    except ImportError:
        return {"endpoint": None, "offline": None, "token": None}, None
    # Not get_token: it may refresh one over the network.
    token = bool(os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN"))
    token = token or Path(constants.HF_TOKEN_PATH).is_file()
    hub = {"endpoint": without_password(constants.ENDPOINT), "offline": constants.HF_HUB_OFFLINE, "token": token}
    return hub, Path(constants.HF_HUB_CACHE).absolute()


def free_of(room: dict) -> str:
    """Return, for example, "1.0 of 2.0 GB free", with the numbers that are known."""
    free, total = (None if room[key] is None else f"{room[key] / 1e9:,.1f}" for key in ("free", "total"))
    if free is None:
        return f"{total} GB" if total else "unknown"
    return f"{free} of {total} GB free"
