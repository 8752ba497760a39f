"""The error that a user can cause, and mend."""

from urllib.parse import urlsplit


class UserError(ValueError):
    """Say in one sentence what is wrong, with both values, and what to do; the command line prints it and exits 2."""


def without_password(address: str) -> str:
    """Return an address as it may be shown: a name and a password can stand before its host."""
    parts = urlsplit(address)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
