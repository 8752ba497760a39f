"""Imports run downwards: from a room to those below it, and in no circle, whenever they are carried out."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
THE_SIX = ("configuration_llama3", "norm", "rotary", "attention", "mlp", "modeling_llama3")

# From the ground. A module belongs to the longest name that it begins with; of one floor none imports another.
FLOORS = [
    ["errors"],
    ["norm", "rotary"],
    ["configuration_llama3", "presets"],
    ["attention", "mlp"],
    ["modeling_llama3"],
    ["remote_code", "files"],
    ["conversion.weights", "conversion.formats.storage"],
    ["conversion.config"],
    ["conversion.checkpoint", "conversion.formats.cast", "conversion.formats.writing"],
    ["conversion.tokenizer", "conversion.formats.safetensors", "conversion.formats.names"],
    ["conversion.formats.unpickle", "conversion.formats.zip", "conversion.formats.torch_files"],
    ["conversion.formats.unzipped"],
    ["conversion.formats.pth"],
    ["conversion.formats.dcp"],
    ["conversion.formats.hf", "conversion.formats.meta", "conversion.formats.gguf"],
    ["conversion.adapter"],
    ["conversion.hub"],
    ["conversion.opening"],
    ["conversion.plan", "conversion.info"],
    ["conversion.plan_gguf"],
    ["conversion.load", "conversion.logits"],
    ["conversion.verify", "conversion.streaming"],
    ["conversion.provenance"],
    ["conversion.adapter.run"],
    ["conversion.convert"],
    ["conversion"],
    ["cpu", "distributed"],
    ["text"],
    ["measure", "training", "model_card"],
    ["registration", "doctor", "quickstart"],
    [""],  # the package's face, which hands names on
    ["cli"],
    ["__main__"],
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> dict[str, Path]:
    """Return the path of every module by its name below hf_llama3."""
    found = {}
    for top in ("hf_llama3", "conversion", "model_card"):
        for path in (ROOT / top).rglob("*.py"):
            parts = path.relative_to(ROOT / "hf_llama3" if top == "hf_llama3" else ROOT).with_suffix("").parts
            found[".".join(parts).removesuffix("__init__").removesuffix(".")] = path
    return found


def imports(name: str, path: Path, known) -> set[str]:
    """Return the modules of the package that a module imports anywhere in its code."""
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            absolute = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            parts = ["hf_llama3", *filter(None, package.split("."))]
            base = ".".join(parts[: len(parts) + 1 - node.level] + ([node.module] if node.module else []))
            absolute = [(base, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            absolute = [(node.module, alias.name) for alias in node.names]
        else:
            continue
        for base, attribute in absolute:
            if base.split(".")[0] == "hf_llama3":
                base = base.removeprefix("hf_llama3").removeprefix(".")
                below = f"{base}.{attribute}".removeprefix(".")
                found.add(below if below in known else base)
    return found - {name}


MODULES = modules()
GRAPH = {name: imports(name, path, MODULES) for name, path in MODULES.items()}


def room(name: str) -> str:
    return max((room for room in FLOOR if name == room or name.startswith(f"{room}.")), key=len, default="")


@pytest.mark.parametrize("name", GRAPH)
def test_imports_run_downwards(name):
    upwards = {other for other in GRAPH[name] if room(other) != room(name) and FLOOR[room(other)] >= FLOOR[room(name)]}
    assert not upwards, f"{name or 'the face'} stands on floor {FLOOR[room(name)]}"


def test_no_circle():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(f"imports in a circle: {error.args[1]}")


def test_the_six_know_only_each_other():
    for name in THE_SIX:
        assert GRAPH[name] <= set(THE_SIX), name


def test_every_module_has_a_room_and_every_room_a_module():
    assert all(room(name) for name in MODULES if name)
    assert {room(name) for name in MODULES} == set(FLOOR)


def test_no_room_is_too_large():
    folders = {}
    for path in MODULES.values():
        folders.setdefault(path.parent, []).append(path)
        assert len(path.read_text("utf-8").splitlines()) <= 350, path
    for folder, paths in folders.items():
        assert len([path for path in paths if not path.stem.startswith("__")]) <= 12, folder


def test_the_tree_in_contributing_is_true():
    """Every module stands in it, but for the commands, one for each group; and nothing that is gone."""
    tree = (ROOT / "CONTRIBUTING.md").read_text("utf-8").split("## Where things are")[1].split("```")[1]
    stems = {path.stem for name, path in MODULES.items() if room(name) != "cli" and not path.stem.startswith("__")}
    assert stems <= set(re.findall(r"\w+", tree)), stems - set(re.findall(r"\w+", tree))
    named = set(re.findall(r"(\w+)\.py", tree)) - {"test_floors", "parity", "test_examples", "test_notebooks"}
    assert named <= stems | {"main"}, named - stems
