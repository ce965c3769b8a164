"""`python -m duomoe.plan`: print how a model's memory would be divided, without loading its weights."""

import argparse
import json
import sys
from collections.abc import Sequence

from duomoe.command import Parser, add_running_options, engine_config, run_command, write


def parser() -> argparse.ArgumentParser:
    """Return the command line's grammar."""
    p = Parser(
        prog="python -m duomoe.plan",
        description="Print the memory plan of a model; reads config.json and the headers of its safetensors files.",
    )
    add_running_options(p)
    p.add_argument("--json", action="store_true", help="print one JSON object, with sizes in bytes")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(lambda: _plan(parser().parse_args(argv)))


def _plan(args: argparse.Namespace) -> None:
    plan = engine_config(args).plan(args.model)
    write((json.dumps(plan.as_dict()) if args.json else plan.table()) + "\n")


if __name__ == "__main__":
    sys.exit(main())
