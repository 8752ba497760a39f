"""The two-way bridge between Meta's checkpoint format and Hugging Face's.

Opening, converting and verifying need neither torch nor transformers; `load_meta` brings both.
"""

from .convert import ConversionReport, convert
from .info import CheckpointInfo, inspect
from .verify import VerificationReport, verify

__all__ = ["CheckpointInfo", "ConversionReport", "VerificationReport", "convert", "inspect", "load_meta", "verify"]


def __getattr__(name):
    if name == "load_meta":
        from .load import load_meta

        return load_meta
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
