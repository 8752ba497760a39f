"""The six files that a Hub repository carries, so that `trust_remote_code=True` loads it without this package."""

import json
from pathlib import Path

from .errors import UserError

CODE_FILES = (
    "configuration_llama3.py",
    "modeling_llama3.py",
    "attention.py",
    "mlp.py",
    "norm.py",
    "rotary.py",
)
AUTO_MAP = {
    "AutoConfig": "configuration_llama3.Llama3Config",
    "AutoModel": "modeling_llama3.Llama3Model",
    "AutoModelForCausalLM": "modeling_llama3.Llama3ForCausalLM",
    "AutoModelForSequenceClassification": "modeling_llama3.Llama3ForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_llama3.Llama3ForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_llama3.Llama3ForQuestionAnswering",
}


def carries_code(folder) -> bool:
    """Tell whether a folder is of our own type, which transformers loads by the code beside it."""
    return json.loads((Path(folder) / "config.json").read_text("utf-8")).get("model_type") == "llama3"


def code_files() -> dict[str, bytes]:
    """Read the six files: {name: content}."""
    return {name: (Path(__file__).parent / name).read_bytes() for name in CODE_FILES}


def add_code(folder):
    """Put the code and a complete `auto_map` into a folder that `save_pretrained` made of this package's model.

    The library's own way (`register_for_auto_class`) maps only the class that was saved, and engines such as vLLM look
    for `AutoModel`.

    Raises:
        UserError: the folder is of another type, which needs no code.
    """
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text("utf-8"))
    if config.get("model_type") != "llama3":
        raise UserError(f"`model_type` in {path} must be 'llama3' to carry code, got {config.get('model_type')!r}")
    for name, content in code_files().items():
        (Path(folder) / name).write_bytes(content)
    path.write_text(json.dumps(config | {"auto_map": AUTO_MAP}, indent=2) + "\n", "utf-8")


def save_with_code(model, folder, **kwargs):
    """Save a model with the six files beside it; `kwargs` go to `save_pretrained`.

    Raises:
        UserError: it is to be uploaded at once, before the code stands there.
    """
    if kwargs.get("push_to_hub"):
        raise UserError("save_with_code writes a folder; upload that instead of passing push_to_hub=True")
    model.save_pretrained(folder, **kwargs)
    add_code(folder)
