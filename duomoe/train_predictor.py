"""`python -m duomoe.train_predictor`: train or calibrate a predictor on a trace, and print how good it is."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from duomoe.command import Parser, progress_is_visible, run_command, say, write
from duomoe.errors import InputError
from duomoe.output_file import output_target

if TYPE_CHECKING:
    from duomoe.models import Model

MAX_RANK = 8192


def parser() -> argparse.ArgumentParser:
    """Return the command line's grammar."""
    p = Parser(
        prog="python -m duomoe.train_predictor",
        description="Train a predictor of experts on a trace (python -m duomoe.trace), and print how good it is.",
    )
    p.add_argument(
        "--model",
        metavar="DIR",
        help="a folder in Hugging Face layout, or owner/name in the hub's cache (default: the embedded model)",
    )
    p.add_argument("--trace", metavar="TRACE", required=True, help="what to train on")
    p.add_argument("--held-out", metavar="TRACE", help="what to measure on (default: every fifth prompt of --trace)")
    p.add_argument(
        "--kind",
        choices=("history", "gate", "learned"),
        required=True,
        help="history: from earlier choices; gate: the next layers' routers, needs no training, only measuring; "
        "learned: the gate plus a trained correction. The last two need a trace with --hidden",
    )
    p.add_argument(
        "--rank", type=int, default=320, metavar="R", help="of learned's correction: more is better and larger (320)"
    )
    p.add_argument("--out", metavar="FILE", required=True, help="the predictor's file to write")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(lambda: _train(parser().parse_args(argv)))


def _train(args: argparse.Namespace) -> None:
    out = Path(args.out)
    output_target(out, "--out")
    if not 1 <= args.rank <= MAX_RANK:
        raise InputError(f"--rank: {args.rank} is not from 1 to {MAX_RANK}")

    import torch

    from duomoe.experts import predictor_training as training
    from duomoe.experts.predictor import HORIZON, KINDS, default_width, save_predictor
    from duomoe.experts.trace import Trace

    model, fingerprint = _routers_of(args.model)
    layers, width = len(model.config.moe_layers), default_width(model.config)
    if layers < 2:
        raise InputError("there is nothing to predict: the model has fewer than two layers with experts")

    def load(path: str) -> Trace:
        trace = Trace.load(Path(path), fingerprint)
        training.check(trace, model, needs_hidden=args.kind != "history")
        return trace

    train = load(args.trace)
    train, held_out = (train, load(args.held_out)) if args.held_out else training.split(train)
    quiet = not progress_is_visible()
    tensors: dict[str, torch.Tensor] = {}
    if args.kind == "history":
        tensors = training.train_history(model, train, quiet)
    elif args.kind == "learned":
        tensors = training.train_learned(model, train, args.rank, quiet)
    # Measured as it will be used: rounded as it is stored, and by its own code.
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    tensors["reliability"] = torch.zeros(HORIZON, layers, width)
    predictor = KINDS[args.kind].of_tensors(model, tensors)
    forecast = training.foresee(predictor, held_out, model.dtype)
    scores = {args.kind: training.measure(forecast, held_out)}
    others = {
        "moe-infinity": training.moe_infinity(train, held_out, width),
        "previous token": training.previous_token(train, held_out, width),
        "popularity": training.by_popularity(train, held_out, width),
        "shuffled": training.shuffled(forecast),
    }
    scores |= {name: training.measure(other, held_out) for name, other in others.items()}
    tensors["reliability"] = scores[args.kind].precision
    save_predictor(out, args.kind, fingerprint, tensors)
    rates = training.hit_rates(predictor, held_out, model.dtype)
    write("\n".join([*training.table(scores), "", *rates]) + "\n")
    say(f"{len(train.experts)} tokens to train on, measured on {int(held_out.decode.sum())} decode tokens, {out}")


def _routers_of(path: str | None) -> tuple["Model", str]:
    """Return a model of which only the routers are loaded, in float32 on the CPU, and its fingerprint."""
    import torch

    from duomoe.model_folder import ModelFolder
    from duomoe.models import Model

    folder = ModelFolder(path)
    model = Model(folder.architecture, folder.config, torch.device("cpu"), torch.float32, compiled=False)
    names = {name for name, _ in folder.routers()}
    for name, view in model.destinations():
        if name in names:
            folder.stored.read_into(name, view)
    return model, folder.fingerprint()


if __name__ == "__main__":
    sys.exit(main())
