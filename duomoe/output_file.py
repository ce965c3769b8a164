"""Files that the user names to be written: checked before the work, and replaced at once or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from duomoe.errors import InputError

LONGEST_NAME = 255  # bytes, of a file in a folder


def output_target(path: Path, flag: str) -> Path:
    """Return the file that is written when `path` is to be: links are followed.

    Args:
        path: as the user gave it.
        flag: that it was given by, for complaints.

    Raises:
        InputError: when there is something else than a regular file, or no file can be made there.
    """
    try:
        target = Path(os.path.realpath(path))
        if os.path.lexists(target) and not os.path.isfile(target):
            raise InputError(f"{flag}: {path} is a folder or a special file; name a file to write")
        if not path.name or not os.path.isdir(target.parent):
            raise InputError(f"{flag}: {target.parent} is not a folder")
        if not os.access(target.parent, os.W_OK | os.X_OK):
            raise InputError(f"{flag}: {target.parent} is a folder without permission to write")
        if len(os.fsencode(_unfinished(target).name)) > LONGEST_NAME:
            raise InputError(f"{flag}: the name of the file is too long")
    except (OSError, ValueError) as error:
        raise error if isinstance(error, InputError) else InputError(f"{flag}: {path}: {error}") from None
    return target


def _unfinished(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}")


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Give a file to write, which then takes the place of `path`, through links; on any error or interrupt it goes.

    Raises:
        InputError: as `output_target`.
    """
    target = output_target(path, str(path))
    unfinished = _unfinished(target)
    try:
        yield unfinished
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
