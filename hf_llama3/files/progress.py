"""Progress bars on standard error, which may refuse to be written without harm to the work."""

import sys

from tqdm import tqdm


class Quiet:
    """Pass a text on to a stream until that refuses one; what comes after is dropped."""

    def __init__(self, stream):
        self.stream, self.refused = stream, False

    def write(self, text: str) -> int:
        self._try(self.stream.write, text)
        return len(text)

    def flush(self):
        self._try(self.stream.flush)

    def _try(self, act, *arguments):
        if not self.refused:
            try:
                act(*arguments)
            except (OSError, ValueError, AttributeError):  # a full disk, a reader that is gone, no stream
                self.refused = True

    def __getattr__(self, name):
        return getattr(self.stream, name)


def bar(**options) -> tqdm:
    """Return a bar as tqdm makes it; a bar that raised would keep tqdm's lock, and the next would wait for ever."""
    return tqdm(file=Quiet(sys.stderr), **options)


def byte_bar(name: str, total: int, shown: bool) -> tqdm:
    """Return a bar of bytes with the time left."""
    return bar(total=total, unit="B", unit_scale=True, desc=name, disable=not shown)
