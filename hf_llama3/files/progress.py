"""Progress bars on standard error; an error while writing them never stops the work."""

import sys

from tqdm import tqdm


class Quiet:
    """A stream that drops all text after its first error."""

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
            except (OSError, ValueError, AttributeError):  # a full disk, a closed pipe, no stream at all
                self.refused = True

    def __getattr__(self, name):
        return getattr(self.stream, name)


def bar(**options) -> tqdm:
    """Return a tqdm bar that never raises: an error would keep tqdm's lock, and the next bar would hang."""
    return tqdm(file=Quiet(sys.stderr), **options)


def byte_bar(name: str, total: int, shown: bool) -> tqdm:
    """Return a bar of bytes with the time left."""
    return bar(total=total, unit="B", unit_scale=True, desc=name, disable=not shown)
