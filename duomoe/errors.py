"""The exceptions for what a user can mend."""

from collections.abc import Iterator
from contextlib import contextmanager

# As much as a screen of text shows.
LONGEST_MESSAGE = 1500


class InputError(ValueError):
    """What the user gave (a folder, a file, an option, a prompt) cannot be used; the message is one line that says why.

    The command-line tools print it and exit with code 2. It may quote a checkpoint's files: no control character of
    theirs reaches a terminal, and it is no longer than a screen.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class PromptTooLong(InputError):
    """A prompt has more tokens than the model's context has room for."""


class Busy(InputError):
    """What was asked for cannot be done now, because others have that done which it needs; later it may go well."""


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


def one_line(message: str) -> str:
    """Return a message as one line, no longer than a screen, of characters that only show themselves."""
    line = " ".join(message[: 10 * LONGEST_MESSAGE].split())
    if len(line) > LONGEST_MESSAGE:
        line = f"{line[: LONGEST_MESSAGE * 2 // 3]} … {line[-LONGEST_MESSAGE // 3 :]}"
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in line)
