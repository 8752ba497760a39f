"""A model and its tokenizer, in any of the formats that this package knows."""

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_llama3  # noqa: F401  (registers the type "llama3")
from hf_llama3.conversion.load import load_meta, load_meta_tokenizer
from hf_llama3.conversion.opening import open_checkpoint
from hf_llama3.errors import UserError

from .defaults import DTYPES, QUANTIZATIONS
from .optimization import optimize


def load_model(
    name: str,
    dtype: str = "auto",
    rope_factor: float | None = None,
    fast: bool = False,
    quantize: str | None = None,
    compile: bool = False,
    progress: bool = False,
):
    """Load a model and its tokenizer from a local folder of either format, or else by its name on the Hub.

    Args:
        fast: optimise the model, as `quantize` ("int8", "int4") and `compile` do besides what they say.

    Raises:
        UserError: the folder holds no whole checkpoint or no tokenizer, or the name is unknown.
    """
    if quantize not in (None, *QUANTIZATIONS):
        raise UserError(f"--quantize must be one of {QUANTIZATIONS}, got {quantize!r}")
    model, tokenizer = read_model(name, dtype, rope_factor)
    if fast or quantize or compile:
        model = optimize(model, quantize, compile, progress)
    return model, tokenizer


def read_model(name: str, dtype: str, rope_factor: float | None):
    """Do the first part of `load_model`."""
    if dtype not in DTYPES:
        raise UserError(f"--dtype must be one of {DTYPES}, got {dtype!r}")
    path = Path(name)
    if path.exists():
        checkpoint = open_checkpoint(path, rope_factor)  # reads no tensor, and its errors are sentences
        if checkpoint.tokenizer is None:
            raise UserError(f"{checkpoint.path} holds no tokenizer, without which there is no text; add its files")
        if checkpoint.format == "meta":
            model = load_meta(path, rope_factor=rope_factor, dtype=dtype)
            return model.eval(), load_meta_tokenizer(path, rope_factor=rope_factor)
        name = str(checkpoint.path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise UserError(f"the tokenizer of {name} cannot be loaded: {str(error).splitlines()[0]}") from error
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).eval(), tokenizer
    except (OSError, ValueError) as error:
        raise UserError(f"{name} cannot be loaded: {str(error).splitlines()[0]}") from error
