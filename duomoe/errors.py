"""The one exception for what a user can mend."""


class InputError(ValueError):
    """What the user gave (a folder, a file, an option, a prompt) cannot be used; the message is one line that says why.

    The command-line tools print it and exit with code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
