"""Names on the Hub: `owner/name`, `owner/name/original` for Meta's files beside Hugging Face's, or a file of GGUF.

`@revision` may follow each.
"""

import os
import re
from typing import NamedTuple

# Parts of a file's path: none that leads elsewhere, and none that would be a pattern of names.
FILE = r"(?:(?!\.\.?/)[^/@\\*?\[\]]+/)*[^/@\\*?\[\]]+\.gguf"
NAME = re.compile(
    rf"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:(?P<original>/original)|/(?P<file>{FILE}))?(?:@(?P<revision>.+))?"
)


class HubName(NamedTuple):
    repo: str
    original: bool
    revision: str | None  # the main branch, if None
    file: str | None = None  # of GGUF, by its path in the repository


def parse_name(path) -> HubName | None:
    """Parse a name on the Hub; None for a path that exists, or that no repository can have as its name."""
    found = NAME.fullmatch(str(path))
    if not found or os.path.lexists(path) or os.path.lexists(found["repo"]):
        return None  # a folder exists here; with more after it, the name would be somebody's repository
    return HubName(found["repo"], found["original"] is not None, found["revision"], found["file"])
