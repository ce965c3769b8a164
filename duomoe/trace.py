"""`python -m duomoe.trace`: run prompts and record which experts every token used, to train a predictor on."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from duomoe.command import (
    Parser,
    add_running_options,
    engine_config,
    progress_is_visible,
    read_prompts,
    run_command,
    say,
)
from duomoe.errors import InputError


def parser() -> argparse.ArgumentParser:
    """Return the command line's grammar."""
    p = Parser(prog="python -m duomoe.trace", description="Record which experts the tokens of some prompts use.")
    add_running_options(p)
    # One prompt after the other, and each from its first token on, so that a trace is the same everywhere.
    p.set_defaults(max_batch=1, compile="off", prefix_caching=False)
    p.add_argument("--prompts", metavar="FILE", required=True, help="one prompt a line, or .jsonl with a field prompt")
    p.add_argument("--out", metavar="TRACE", required=True, help="the safetensors file to write")
    p.add_argument("--hidden", action="store_true", help="also record the routers' inputs (larger by far)")
    p.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="of each prompt (default: 64)")
    p.add_argument("--temperature", type=float, default=0.8, metavar="T", help="(default: 0.8)")
    p.add_argument("--seed", type=int, default=0, metavar="S", help="(default: 0)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(lambda: _trace(parser().parse_args(argv)))


def _trace(args: argparse.Namespace) -> None:
    prompts = read_prompts(Path(args.prompts))
    out = Path(args.out)
    if not out.parent.is_dir():
        raise InputError(f"--out: {out.parent} is not a folder")

    from tqdm import tqdm

    from duomoe.experts.trace import Recorder
    from duomoe.llm import LLM
    from duomoe.sampling import SamplingParams

    params = SamplingParams(max_new_tokens=args.max_new_tokens, temperature=args.temperature, seed=args.seed)
    quiet = not progress_is_visible()
    llm = LLM(args.model, engine_config(args), quiet=quiet)
    recorder = Recorder(len(llm.config.moe_layers), args.hidden)
    llm.policy.observer = recorder.observe
    for prompt in tqdm(prompts, desc="tracing", unit="prompt", disable=quiet, leave=False):
        recorder.begin()
        llm.generate(prompt, params)
    trace = recorder.trace(llm.fingerprint(), llm.config.num_experts)
    trace.save(out)
    say(f"{len(prompts)} prompts, {len(trace.experts)} tokens, {out}")


if __name__ == "__main__":
    sys.exit(main())
