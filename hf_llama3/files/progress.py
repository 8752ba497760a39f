"""Progress bars, on standard error."""

from tqdm import tqdm


def byte_bar(name: str, total: int, shown: bool) -> tqdm:
    """Return a bar of bytes with the time left, on standard error."""
    return tqdm(total=total, unit="B", unit_scale=True, desc=name, disable=not shown)
