"""Llama 3 as a first-class Hugging Face model package, and the bridge to Meta's checkpoint format.

`import hf_llama3` makes the Auto classes know the model type "llama3"; what is named below is imported when it is used.
"""

from importlib import import_module

from .files.facts import __version__
from .registration import register

# Public name -> the module that holds it
_HOMES = {
    "Llama3Config": "configuration_llama3",
    "Llama3PreTrainedModel": "modeling_llama3",
    "Llama3Model": "modeling_llama3",
    "Llama3ForCausalLM": "modeling_llama3",
    "Llama3ForSequenceClassification": "modeling_llama3",
    "Llama3ForTokenClassification": "modeling_llama3",
    "Llama3ForQuestionAnswering": "modeling_llama3",
    "load_meta": "conversion.load",
    "optimize": "cpu.optimization",
    "restore": "cpu.optimization",
}
_SUBPACKAGES = ("conversion", "model_card", "training")

__all__ = [*_HOMES, "__version__"]


def __getattr__(name):
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name in _SUBPACKAGES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_HOMES, *_SUBPACKAGES])


register()
