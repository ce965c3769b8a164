"""The exceptions for what a user can mend."""

from collections.abc import Iterator
from contextlib import contextmanager

MAX_MESSAGE = 2000  # characters, about a screen


class InputError(ValueError):
    """What the user gave (a folder, a file, an option, a prompt) cannot be used; the message is one line that says why.

    The command-line tools print it and exit with code 2. It may quote a checkpoint's files: no control character of
    theirs reaches a terminal, and it is no longer than a screen.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(message[: 2 * MAX_MESSAGE].split())
        shown = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in line)
        super().__init__(shown if len(shown) <= MAX_MESSAGE else f"{shown[:MAX_MESSAGE]} …")


class PromptTooLong(InputError):
    """A prompt has more tokens than the model's context has room for."""


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
        raise InputError(f"{what}: {str(error) or type(error).__name__}") from None
