"""The one error for what a user can mend: the message is a single line that names the thing and the way out."""

__all__ = ["InputError"]


class InputError(ValueError):
    "Input that cannot be used. The command line prints the message as one line and exits with 2."
