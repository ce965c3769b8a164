"""What the command-line tools have in common: errors in one line, exit codes, and how prompts are read."""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from duomoe import NO_NUMPY
from duomoe.errors import InputError
from duomoe.text_file import read_text

if TYPE_CHECKING:
    from duomoe.config import EngineConfig


class Parser(argparse.ArgumentParser):
    """Complains in one line."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise InputError(f"{message} (see --help)")


def add_running_options(p: argparse.ArgumentParser) -> None:
    """Add the choices of how a model is run, the same for all tools; `engine_config` reads them."""
    p.add_argument(
        "--model",
        metavar="DIR",
        help="a folder in Hugging Face layout, or owner/name in the hub's cache (default: the embedded model)",
    )
    running = p.add_argument_group("running")

    def add(flag: str, **options: Any) -> None:
        running.add_argument(flag, **options)

    add("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    add("--dtype", default="auto", help="auto (the checkpoint's), float32, bfloat16, float16 (default: %(default)s)")
    add(
        "--expert-dtype",
        default="auto",
        help="of the experts: plain (as --dtype), bf16-packed (bfloat16 in 12 bits, lossless), fp8 or int4, quantised "
        "while loading; auto is what is stored, but bf16-packed for bfloat16 on a GPU (default: %(default)s)",
    )
    add("--policy", default="auto", help="auto, resident, duo, lru or a baseline (default: %(default)s)")
    add(
        "--gpu-memory",
        metavar="SIZE",
        help="memory on the GPU for everything, as 8GiB (default: 90%% of what is free); on a CPU, memory for all but "
        "the experts' home (default: no limit)",
    )
    add(
        "--expert-memory",
        metavar="SIZE",
        help="of it, for expert slots, as 2GiB or as a share of all experts, 15%% (default: what the rest leaves)",
    )
    add(
        "--max-model-len",
        type=int,
        metavar="N",
        help="longest sequence in tokens (default: the checkpoint's, or what memory allows)",
    )
    add("--max-batch", type=int, default=8, metavar="N", help="sequences decoded together (default: %(default)s)")
    add(
        "--predictor",
        metavar="FILE",
        help="for policy duo: a file of duomoe.train_predictor, gate or none (default: the checkpoint's "
        "predictor.safetensors, else gate)",
    )
    add(
        "--no-prefix-caching",
        dest="prefix_caching",
        action="store_false",
        help="do not keep what was computed for prompts that begin alike",
    )
    add("--engine-log", metavar="FILE", help="write what the engine does and how long it takes, for duomoe.simulate")
    add("--link-bandwidth", metavar="RATE", help="pace the link of a CPU to this, as 25GB/s")
    add("--link-latency", default="0us", metavar="TIME", help="of a copy over a paced link, as 10us")
    add(
        "--compile",
        default="auto",
        help="torch.compile for the layers around the experts: on or off; auto is off, which starts sooner and is as "
        "fast (default: %(default)s)",
    )
    add("--no-graph", dest="graph", action="store_false", help="do not run decode steps as CUDA graphs")


def engine_config(args: argparse.Namespace) -> "EngineConfig":
    """Return what was chosen with the options of `add_running_options`."""
    from duomoe.config import EngineConfig

    return EngineConfig(**{field.name: getattr(args, field.name) for field in dataclasses.fields(EngineConfig)})


def run_command(body: Callable[[], int | None]) -> int:
    """Run a tool and return its exit code: its own, or 0; 2 for what the user can mend, said in one line.

    An interrupt is 130. A reader that leaves (a closed pipe) ends the tool silently.
    """
    warnings.showwarning = lambda message, *_: say(f"warning: {message}")
    warnings.filterwarnings("ignore", NO_NUMPY)
    # Threads that wait should sleep: where the cores are shared, spinning ones make small models many times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return body() or 0
    except InputError as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _abandon_stdout()
    return 0


def say(message: str) -> None:
    """Write one line about the run to stderr; where nobody can read it, it is lost and the run goes on."""
    if sys.stderr is not None:
        from tqdm import tqdm

        with contextlib.suppress(OSError):
            tqdm.write(f"duomoe: {message}", file=sys.stderr)  # above a line of progress, if there is one
            sys.stderr.flush()


def write(text: str) -> None:
    """Write output to stdout at once.

    Raises:
        InputError: when it cannot be written.
        BrokenPipeError: when its reader has left.
    """
    if sys.stdout is None:
        raise InputError("standard output is closed; there is nowhere to write to")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _abandon_stdout()
        raise InputError(f"standard output: {error.strerror}") from None


def progress_is_visible() -> bool:
    """Return whether a person watches stderr."""
    return sys.stderr is not None and sys.stderr.isatty()


def _abandon_stdout() -> None:
    """Keep Python from flushing what cannot be written when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a file: one a line, or with the ending .jsonl one JSON object a line with a field `prompt`.

    Raises:
        InputError: when there are none, or a line is not what it should be.
    """
    lines = [line for line in read_text(path, piped=True).splitlines() if line.strip()]
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
