"""The one error that people see: what is wrong, the bound it breaks, and what to do, in one line.
Imports nothing; printing is left to the command line.
"""


class CoterieError(Exception):
    """A mistake that the user can mend. The command line prints its message and exits with code 1."""


def first_line(error: Exception) -> str:
    """What a library says, for a message of one line; its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
