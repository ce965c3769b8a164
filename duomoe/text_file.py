"""Text files as users give them: prompts, chat templates."""

import stat
from pathlib import Path

from duomoe.errors import InputError

# More text than any model's context holds; what goes on for longer is not a prompt.
MAX_TEXT_BYTES = 64 << 20


def read_text(path: Path, *, piped: bool = False) -> str:
    """Return a file's text.

    Args:
        path: the file.
        piped: it may come through a pipe or a device, too, as /dev/stdin does, and the files that shells make of a
            command's output. Who names a pipe to which nobody writes waits.

    Raises:
        InputError: when it cannot be read, is not UTF-8, or is no regular file and not `piped`.
    """
    try:
        if not piped and not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{path}: not a regular file")  # before it is opened: with a pipe, that waits for a writer
        with path.open("rb") as file:
            content = file.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except InputError:
        raise
    except ValueError:
        raise InputError(f"{path}: no file has such a name") from None
    if len(content) > MAX_TEXT_BYTES:
        raise InputError(f"{path}: more than {MAX_TEXT_BYTES} bytes of text")
    try:
        return content.decode("utf-8")
    except UnicodeError:
        raise InputError(f"{path}: not UTF-8 text") from None
