"""Time starts: from the command to the first token, and loading, each part of it; writes JSON, prints tables.

`python tests/benchmarks/start.py --out FILE --model LABEL=DIR …` starts `python -m duomoe.generate` in processes of
their own: once with nothing compiled, then as often as `--rounds` says with what that has left. `--load LABEL=DIR …`
loads checkpoints without generating, `--expert-dtype` in each of several forms. FILE has the figures of each device.
`--tables FILE` prints them as the tables of docs/measurements.md.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from duomoe.startup import PARTS

PROMPT = "Emma was not at all surprised when"

# Loads a model and says what that took; the host's memory before is that of torch and CUDA alone.
LOAD = """
import json, resource, sys
import torch
from duomoe import LLM
if torch.cuda.is_available():
    torch.zeros(1, device="cuda")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
llm = LLM(sys.argv[1], **json.loads(sys.argv[2]))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
used = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
print(json.dumps(llm.startup.as_dict() | {
    "rows_bytes": llm.memory["expert_store_bytes"], "host_peak_bytes": 1024 * (peak - before),
    "gpu_peak_bytes": used, "gpu_plan_bytes": llm.plan.total if used else 0,
}))
"""


def start(model: str, options: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Start `generate`, and return how long it took to the first token, and the parts of that.

    It writes once all tokens are there, so the time between the first and the last is subtracted.
    """
    command = [sys.executable, "-P", "-m", "duomoe.generate", "--model", model, "--prompt", PROMPT, "--json", *options]
    command += ["--max-new-tokens", "32", "--temperature", "0.8", "--seed", "1"]
    begin = time.perf_counter()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        seconds = time.perf_counter() - begin
        found = json.loads(first + process.stdout.read())
    to_first = seconds - (found["e2e_s"] - found["ttft_s"])
    return {"first_token_s": to_first, "ttft_s": found["ttft_s"], "tpot_s": found["tpot_s"]} | found["start"]


def load(model: str, config: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    """Load a model in a process of its own."""
    command = [sys.executable, "-P", "-c", LOAD, model, json.dumps(config)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def medians(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Return each figure's median."""
    return {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run everything that was asked for."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    found: dict[str, Any] = {"device": f"{device}, torch {torch.__version__}", "starts": {}, "loads": {}}
    for named in args.model:
        label, _, model = named.partition("=")
        options = [*args.also.split(), *(["--expert-memory", args.expert_memory] if args.expert_memory else [])]
        with tempfile.TemporaryDirectory() as cache:
            environment = os.environ | {"TRITON_CACHE_DIR": cache}
            first = start(model, options, environment)
            rounds = [start(model, options, environment) for _ in range(args.rounds)]
            found["starts"][label] = {"first": first, "later": medians(rounds), "rounds": rounds}
        print(label, json.dumps(found["starts"][label]["first"]), json.dumps(medians(rounds)), flush=True)
    for named in args.load:
        label, _, model = named.partition("=")
        for form in args.expert_dtype:
            config = {"expert_dtype": form} | ({"expert_memory": args.expert_memory} if args.expert_memory else {})
            rounds = [load(model, config, dict(os.environ)) for _ in range(args.rounds)]
            found["loads"][f"{label}, {form}"] = {"median": medians(rounds), "rounds": rounds}
            print(label, form, json.dumps(medians(rounds)), flush=True)
    return found


def page(device: str, found: dict[str, Any]) -> str:
    """Return what docs/measurements.md has of one device."""
    return f"{device}; medians, in seconds:\n\n{tables(found)}"


def tables(found: dict[str, Any]) -> str:
    """Return the tables of docs/measurements.md."""
    lines = []
    if found["starts"]:
        head = ["start", "to the first token", *PARTS[:3], PARTS[6], "TTFT", "of all this, compiling"]
        lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for label, each in found["starts"].items():
            for name, figures in (("first", each["first"]), ("later", each["later"])):
                cells = [figures[f"{part}_s"] for part in (*PARTS[:3], PARTS[6])]
                row = [figures["first_token_s"], *cells, figures["ttft_s"], figures["compiling_s"]]
                lines.append(f"| {label}, {name} | " + " | ".join(f"{cell:.2f}" for cell in row) + " |")
        lines.append("")
    if found["loads"]:
        head = [
            "loading",
            "GB",
            "seconds",
            "GB/s",
            *PARTS[3:6],
            "host's peak over the rows",
            "GPU's peak over its plan",
        ]
        lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for label, each in found["loads"].items():
            figures = each["median"]
            size, seconds = figures["loaded_bytes"], figures["loading_s"]
            row = [size / 1e9, seconds, size / seconds / 1e9, *(figures[f"{part}_s"] for part in PARTS[3:6])]
            for part, whole in (("host_peak_bytes", "rows_bytes"), ("gpu_peak_bytes", "gpu_plan_bytes")):
                row.append(figures[part] / figures[whole] if figures[whole] else math.nan)
            lines.append(f"| {label} | " + " | ".join(f"{cell:.2f}" for cell in row) + " |")
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Measure, or print tables."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", nargs="*", default=[], metavar="LABEL=DIR", help="to start with")
    p.add_argument("--load", nargs="*", default=[], metavar="LABEL=DIR", help="to load")
    p.add_argument("--expert-dtype", nargs="*", default=["auto"], help="of what is loaded, each in turn")
    p.add_argument("--expert-memory", help="as of duomoe.generate")
    p.add_argument("--also", default="", metavar="OPTIONS", help="of duomoe.generate, for starts: '--compile on'")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--out", type=Path, help="the JSON file to add to")
    p.add_argument("--tables", type=Path, help="print the tables of a file, and do nothing else")
    args = p.parse_args()
    if args.tables:
        for device, figures in json.loads(args.tables.read_text()).items():
            print(page(device, figures))
        return
    found = measure(args)
    if args.out:
        every = json.loads(args.out.read_text()) if args.out.exists() else {}
        before = every.setdefault(found.pop("device"), {"starts": {}, "loads": {}})
        for kind, figures in found.items():
            before[kind] |= figures
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(every, indent=1) + "\n")
    print(tables(found), end="")


if __name__ == "__main__":
    main()
