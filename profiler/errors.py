"""The one error that people see: what is wrong, the bound it breaks, and what to do, in one line."""


class CoterieError(Exception):
    """A mistake that the user can mend. The command line prints its message and exits with code 1."""
