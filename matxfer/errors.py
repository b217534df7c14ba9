"""The one base of all errors that a user can cause and mend; anything else is a bug of ours."""

from __future__ import annotations


class MatxferError(ValueError):
    """Bad input, file or option: the message says what is wrong, where, and what to do."""


class OptionError(MatxferError):
    """An option out of its range, or options that do not go together."""
