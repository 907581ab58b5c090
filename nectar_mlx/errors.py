"""The one exception that the library raises for what its user can cause."""

FIT_AGAIN = "fit it again"  # the advice for a .nectar that is damaged


class NectarError(Exception):
    """The input is at fault; as text, one line that says what is wrong and what to do.

    message: what is wrong, and what to do where only one thing can be said. advice: what to do, "" for nothing, apart
    from the message where a caller knows better what that is.
    """

    def __init__(self, message: str, *, advice: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.advice = advice

    def __str__(self) -> str:
        return f"{self.message}; {self.advice}" if self.advice else self.message
