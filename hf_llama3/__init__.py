"""Llama 3 as a first-class Hugging Face model package, and the bridge to Meta's checkpoint format.

`import hf_llama3` makes the Auto classes know the model type "llama3"; what is named below is imported when it is used.
"""

from importlib.metadata import version

from .lazy import on_use
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
    "optimize": "generation.optimization",
    "restore": "generation.optimization",
}
_SUBPACKAGES = ("conversion", "generation", "model_card", "training")

__version__ = version("hf_llama3")
__all__ = [*_HOMES, "__version__"]
__getattr__ = on_use(__name__, _HOMES, _SUBPACKAGES)


def __dir__():
    return sorted([*globals(), *_HOMES, *_SUBPACKAGES])


register()
