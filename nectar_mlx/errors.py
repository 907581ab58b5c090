"""The one exception that the library raises for what its user can cause."""


class NectarError(Exception):
    """The input is at fault; the message is one line that says what is wrong and what to do."""
