"""What the command-line tools have in common: errors in one line, exit codes, and how prompts are read."""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from duomoe.errors import InputError


class Parser(argparse.ArgumentParser):
    """Complains in one line."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise InputError(f"{message} (see --help)")


def run_command(body: Callable[[], None]) -> int:
    """Run a tool and return its exit code: 0; 2 for what the user can mend, said in one line; 130 when interrupted.

    A reader that leaves (a closed pipe) ends the tool silently.
    """
    warnings.showwarning = lambda message, *_: print(f"duomoe: warning: {message}", file=sys.stderr)
    # Threads that wait should sleep: where the cores are shared, spinning ones make small models many times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        body()
    except InputError as error:
        print(f"duomoe: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Nothing can be flushed to whoever read our output any more, so keep Python from trying.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def read_text(path: Path) -> str:
    """Return a file's text.

    Raises:
        InputError: when it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except UnicodeError:
        raise InputError(f"{path}: not UTF-8 text") from None


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a file: one a line, or with the ending .jsonl one JSON object a line with a field `prompt`.

    Raises:
        InputError: when there are none, or a line is not what it should be.
    """
    lines = [line for line in read_text(path).splitlines() if line.strip()]
    if not lines:
        raise InputError(f"{path}: no prompts in it")
    if path.suffix != ".jsonl":
        return lines
    prompts = []
    for number, line in enumerate(lines, start=1):
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            prompt = None
        if not isinstance(prompt, str):
            raise InputError(f"{path}: line {number} is not a JSON object with a text field prompt")
        prompts.append(prompt)
    return prompts
