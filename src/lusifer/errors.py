"""The one exception that stands for a mistake of the user."""


class LusiferError(Exception):
    """A mistake the user can mend; the CLI prints its message as one line and exits 2."""
