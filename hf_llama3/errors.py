"""The error that a user can cause, and mend."""


class UserError(ValueError):
    """Say in one sentence what is wrong, with both values, and what to do; the command line prints it and exits 2."""
