"""Write a model card from facts, and upload a folder with its card to the Hub."""

from .card import build_card, write_card
from .licenses import check_license
from .publish import publish

__all__ = ["build_card", "check_license", "publish", "write_card"]
