"""Llama 3 from scratch, on a text: tokenizer, data and recipe."""

from .recipe import TrainingReport, train

__all__ = ["TrainingReport", "train"]
