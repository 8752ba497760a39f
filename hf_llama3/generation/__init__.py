"""Text from a model: loading by what lies in a folder, prompts in, completions out."""

from .text import Completion, generate_text, load_model

__all__ = ["Completion", "generate_text", "load_model"]
