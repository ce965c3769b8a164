"""The one exception for what a user can mend."""

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """What the user gave (a folder, a file, an option, a prompt) cannot be used; the message is one line that says why.

    The command-line tools print it and exit with code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


@contextmanager
def naming_failures(what: str) -> Iterator[None]:
    """Turn whatever a library raises into an InputError that begins with `what`.

    The tokenizers library raises bare Exception, and what it did not foresee arrives as a panic, a BaseException.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, InputError):
        raise
    except BaseException as error:
        raise InputError(f"{what}: {error or type(error).__name__}") from None
