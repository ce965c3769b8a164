"""`python -m duomoe.simulate`: let the scheduler run again over what an engine's log says arrived."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from duomoe.command import Parser, run_command, write


def parser() -> argparse.ArgumentParser:
    """Return the command line's grammar."""
    p = Parser(
        prog="python -m duomoe.simulate",
        description="Simulate what arrived by an engine's log (--engine-log); say how far that is from what happened.",
    )
    p.add_argument("log", metavar="LOG", help="the file")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(lambda: _simulate(parser().parse_args(argv)))


def _simulate(args: argparse.Namespace) -> None:
    from duomoe.engine.simulation import replay

    found = replay(Path(args.log))
    write(
        f"{found.requests} requests, {found.decisions} decisions\n"
        f"costs estimated from those before: a pass off by {found.pass_error:.1%}, a step by {found.step_error:.1%}\n"
        f"simulated: TTFT off by {found.ttft_error:.1%}, end to end by {found.e2e_error:.1%} (medians)\n"
    )


if __name__ == "__main__":
    sys.exit(main())
