"""What the command-line tools have in common for chats: their options, and files of messages."""

import argparse
import json
from pathlib import Path
from typing import Any

from duomoe.errors import InputError
from duomoe.text_file import read_text


def add_chat_options(p: argparse.ArgumentParser) -> None:
    """Add the choices of how a chat begins; `template_kwargs` reads some of them."""
    chat = p.add_argument_group("chats")
    chat.add_argument("--system", metavar="TEXT", help="a system message, before all others")
    chat.add_argument(
        "--template-arg",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a variable for the chat template, as enable_thinking=false; JSON, or else text; repeatable",
    )


def template_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """Return the variables that --template-arg gives.

    Raises:
        InputError: when one has no name.
    """
    found = {}
    for argument in args.template_arg:
        name, separator, value = argument.partition("=")
        if not separator or not name.isidentifier():
            raise InputError(f"--template-arg is written KEY=VALUE, as enable_thinking=false, not {argument!r}")
        try:
            found[name] = json.loads(value)
        except (ValueError, RecursionError):
            found[name] = value
    return found


def read_messages(path: Path) -> list[dict[str, Any]]:
    """Return the messages of a JSON file: a list of objects, which the chat template's reader checks further.

    Raises:
        InputError: when the file cannot be read, or holds no such list.
    """
    try:
        found = json.loads(read_text(path, piped=True))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, list) or not all(isinstance(message, dict) for message in found):
        raise InputError(f"{path}: not a list of messages, each an object with role and content")
    return found
