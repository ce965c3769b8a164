"""Text files as users give them: prompts, chat templates."""

from pathlib import Path

from duomoe.errors import InputError

# More text than any model's context holds; what goes on for longer is not a prompt.
MAX_TEXT_BYTES = 64 << 20


def read_text(path: Path) -> str:
    """Return a file's text.

    Raises:
        InputError: when it cannot be read, or is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise InputError(f"{path}: no file has such a name") from None
    if len(content) > MAX_TEXT_BYTES:
        raise InputError(f"{path}: more than {MAX_TEXT_BYTES} bytes of text")
    try:
        return content.decode("utf-8")
    except UnicodeError:
        raise InputError(f"{path}: not UTF-8 text") from None
