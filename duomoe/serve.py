"""`python -m duomoe.serve`: serve a model to clients of the OpenAI API."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from duomoe.command import Parser, add_running_options, engine_config, progress_is_visible, run_command, say
from duomoe.errors import InputError
from duomoe.sizes import parse_size, parse_time
from duomoe.text_file import read_text

if TYPE_CHECKING:
    from duomoe.server.served_model import ServedModel
    from duomoe.server.service import Limits, Service

# The name of the embedded model, for clients.
EMBEDDED = "duomoe-embedded"

KEY_VARIABLE = "DUOMOE_API_KEY"


def parser() -> argparse.ArgumentParser:
    """Return the command line's grammar."""
    p = Parser(
        prog="python -m duomoe.serve", description="Serve a Mixture-of-Experts model to clients of the OpenAI API."
    )
    add_running_options(p)
    serving = p.add_argument_group("serving")
    serving.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    serving.add_argument("--port", type=int, default=8000, help="0 takes any that is free (default: %(default)s)")
    serving.add_argument(
        "--served-model-name",
        action="append",
        default=[],
        metavar="NAME",
        help="what clients call the model; repeatable, the first is in answers (default: the folder's name)",
    )
    serving.add_argument("--api-key", metavar="KEY", help=f"ask clients for it (default: ${KEY_VARIABLE}, if set)")
    serving.add_argument("--api-key-file", metavar="FILE", help="ask clients for one of its keys, one a line")
    serving.add_argument(
        "--max-sequences",
        type=int,
        default=1024,
        metavar="N",
        help="that run or wait at once; more are refused with status 429 (default: %(default)s)",
    )
    serving.add_argument("--max-body", default="8MiB", metavar="SIZE", help="of a request (default: %(default)s)")
    serving.add_argument(
        "--request-timeout", default="3600s", metavar="TIME", help="for one request (default: %(default)s)"
    )
    serving.add_argument("--access-log", action="store_true", help="write a line of JSON for each request to stdout")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(lambda: _run(parser().parse_args(argv)))


def _run(args: argparse.Namespace) -> int:
    keys, limits = _keys(args), _limits(args)
    try:
        from duomoe.server.access_log import AccessLog
        from duomoe.server.app import make_app
        from duomoe.server.process import bind, serve, url_of
        from duomoe.server.service import Service
    except ModuleNotFoundError as error:
        raise InputError(f"serving needs {error.name}; install it with: pip install 'duomoe[serve]'") from None
    # Before the model loads, so that an address that cannot be had is known at once.
    listener = bind(args.host, args.port)
    url = url_of(listener)
    say(f"listening at {url}; the model is loading")
    service = Service(_names(args), limits)
    log = AccessLog() if args.access_log else None
    try:
        return serve(listener, make_app(service, keys, log), service, lambda: _load(args, service, url))
    finally:
        if log is not None:
            log.close()


def _load(args: argparse.Namespace, service: "Service", url: str) -> "ServedModel":
    """Return the model, ready to be asked."""
    from duomoe.startup import Startup

    startup = Startup(quiet=not progress_is_visible())
    with startup.part("importing"):
        from duomoe.llm import LLM
        from duomoe.sampling import SamplingParams
        from duomoe.server.served_model import ServedModel

    with startup.counting_kernels():
        llm = LLM(args.model, engine_config(args), startup=startup)
        llm.prepare(SamplingParams())
    say(startup.line())
    say(f"ready: {', '.join(service.names)} at {url}")
    return ServedModel(llm, service)


def _names(args: argparse.Namespace) -> list[str]:
    if args.served_model_name:
        return list(args.served_model_name)
    return [EMBEDDED if args.model is None else Path(args.model).resolve().name]


def _keys(args: argparse.Namespace) -> list[str]:
    """Return the keys that clients may have, from wherever they are stated."""
    keys = [args.api_key if args.api_key is not None else os.environ.get(KEY_VARIABLE)]
    if args.api_key_file is not None:
        lines = [line.strip() for line in read_text(Path(args.api_key_file), piped=True).splitlines()]
        keys += [line for line in lines if line]
        if len(keys) == 1:
            raise InputError(f"{args.api_key_file}: no keys in it; write one a line")
    stated = [key for key in keys if key is not None]
    for key in stated:
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise InputError("an API key is printable ASCII without blanks, at least one character")
    return stated


def _limits(args: argparse.Namespace) -> "Limits":
    """Return what the server takes on."""
    if args.max_sequences < 1:
        raise InputError(f"--max-sequences must be at least 1, got {args.max_sequences}")
    seconds = parse_time(args.request_timeout, "--request-timeout")
    if not seconds > 0:
        raise InputError(f"--request-timeout must be longer than nothing, got {args.request_timeout}")
    from duomoe.server.service import Limits

    return Limits(parse_size(args.max_body, "--max-body"), request_seconds=seconds, sequences=args.max_sequences)


if __name__ == "__main__":
    sys.exit(main())
