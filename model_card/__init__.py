"""A model card from facts: what the folder's files say, and nothing else."""

from .card import build_card, check_license

__all__ = ["build_card", "check_license"]
