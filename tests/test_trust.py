"""No code of a checkpoint runs: every load says so itself, and no answer on standard input changes that."""

import ast
import json
import re
from pathlib import Path

import pytest
from checkpoints import hf_model
from forked import python

import hf_llama3
import hf_llama3.conversion
import hf_llama3.model_card
from hf_llama3.training.tokenizer import tiktoken_tokenizer, train_bpe

LOADS = ("from_pretrained", "from_config")
TEXT = "The quick brown fox jumps over the lazy dog. " * 200
PACKAGES = (hf_llama3, hf_llama3.conversion, hf_llama3.model_card)
SOURCES = sorted({path for package in PACKAGES for path in Path(package.__file__).parent.rglob("*.py")})


def untrusting(call: ast.Call) -> bool:
    """Tell whether a call is given `trust_remote_code=False`, literally."""
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    value = given.get("trust_remote_code")
    return isinstance(value, ast.Constant) and value.value is False


def loads(path: Path) -> list[ast.Call]:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return [node for node in nodes if isinstance(node, ast.Call) and getattr(node.func, "attr", None) in LOADS]


def test_every_load_refuses_code():
    calls = [(path, call) for path in SOURCES for call in loads(path)]
    assert len(calls) > 10
    assert [f"{path}:{call.lineno}" for path, call in calls if not untrusting(call)] == []


@pytest.fixture(scope="module")
def trap(tmp_path_factory):
    """A good model folder, but for a tokenizer class that only the folder's own code knows; the code leaves a mark."""
    folder = tmp_path_factory.mktemp("trap") / "model"
    folder.mkdir()
    made = tiktoken_tokenizer(train_bpe([TEXT], 600), context=64)
    for name, content in made.files.items():
        (folder / name).write_bytes(content)
    hf_model(**made.vocabulary, max_position_embeddings=64).save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Unknown", "auto_map": {"AutoTokenizer": ["planted.Unknown", "planted.Unknown"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    plant(folder, "Unknown", "PreTrainedTokenizerFast")
    return folder


@pytest.fixture(scope="module")
def trap_of_model(tmp_path_factory, trap):
    """The same, but it is the configuration that names a class of the folder's own code."""
    folder = tmp_path_factory.mktemp("trap-of-model") / "model"
    folder.mkdir()
    for path in trap.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "unknown",
        "auto_map": {"AutoConfig": "planted.Unknown", "AutoModelForCausalLM": "planted.Unknown"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    plant(folder, "Unknown", "PretrainedConfig")
    return folder


def plant(folder: Path, name: str, base: str):
    code = f"open({str(folder / 'mark')!r}, 'w').close()\nfrom transformers import {base}\nclass {name}({base}): pass\n"
    (folder / "planted.py").write_text(code)


COMMANDS = {
    "generate": ["generate", "{}", "The", "--max-new-tokens", "2"],
    "generate, layers divided": ["generate", "{}", "The", "--max-new-tokens", "2", "--device-map", "auto"],
    "chat": ["chat", "{}"],
    "evaluate": ["evaluate", "{}", "--text", "{text}"],
    "bench": ["bench", "{}", "--prompt-tokens", "4", "--new-tokens", "2"],
    "train": ["train", "--text", "{text}", "--output", "{out}", "--from", "{}", "--steps", "1", "--context", "32"],
    "push": ["push", "{}", "somebody/model", "--dry-run"],
    "card": ["card", "{}"],
    "inspect": ["inspect", "{}", "--device-map", "auto"],
    "convert": ["convert", "{}", "{out}"],
}


@pytest.mark.parametrize("kind", ["trap", "trap_of_model"])
@pytest.mark.parametrize("command", COMMANDS)
def test_no_answer_runs_code(command, kind, request, tmp_path):
    folder = request.getfixturevalue(kind)
    (tmp_path / "text.txt").write_text(TEXT)
    places = {"text": tmp_path / "text.txt", "out": tmp_path / "out"}
    arguments = [part.format(folder, **places) for part in COMMANDS[command]]
    process = python("-m", "hf_llama3", *arguments, standard_input="y\n" * 1000)
    assert not (folder / "mark").exists(), process.stderr
    assert process.returncode in (0, 2) and "Traceback" not in process.stderr, process.stderr
    assert "[y/N]" not in process.stdout + process.stderr


def test_the_trap_is_one(trap):
    """The planted code does run where it is trusted: a trap that never closes would prove nothing."""
    script = (
        f"from transformers import AutoTokenizer\nAutoTokenizer.from_pretrained({str(trap)!r}, trust_remote_code=True)"
    )
    try:
        python("-c", script)
        assert (trap / "mark").exists()
    finally:
        (trap / "mark").unlink(missing_ok=True)


def test_the_tests_that_the_promises_name():
    root = Path(__file__).parent.parent
    named = set(re.findall(r"test_\w+\.py", (root / "SECURITY.md").read_text()))
    assert len(named) >= 8 and named <= {path.name for path in (root / "tests").rglob("test_*.py")}
