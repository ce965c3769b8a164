"""DuoMoE beside transformers on two CPU cores, the embedded model: `make bench-cpu`.

Both run greedily, in one process and without a compiler: a prompt (prefill), then one token after the other (decode).
DuoMoE is measured through `LLM.generate`, by the metrics it gives. transformers is measured by a loop around the
forward pass of its model, which is faster than its `generate`, with only the last token's logits asked for. Both hand
each token to the host.

transformers has a choice of attention, experts and cache. Each combination runs a few times first; the one with the
fastest run, for each phase and dtype, is what DuoMoE is compared with. In each round both then run once, so that drift
of the machine hits both alike. A ratio is transformers' median over DuoMoE's: how many times as fast DuoMoE is.
"""

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from duomoe import LLM, SamplingParams
from duomoe.llm import EMBEDDED_MODEL

TEXT = Path(__file__).parents[2] / "docs" / "design.md"  # the model has not seen it
THREADS = 2
PROMPT_TOKENS, NEW_TOKENS = 512, 64
PHASES = ("prefill", "decode")

# What transformers offers.
ATTENTION = ("sdpa", "eager")
EXPERTS = ("grouped_mm", "batched_mm", "eager")
CACHES = {"dynamic": transformers.DynamicCache, "static": transformers.StaticCache}
SCREENING = 3  # runs of each combination


@dataclass(frozen=True)
class Run:
    """What one request took, in seconds, and its tokens."""

    prefill: float
    decode: float  # a token
    tokens: list[int]


@dataclass(frozen=True)
class Cell:
    """One line of the table. Times are medians in seconds, those of decode for a token."""

    phase: str
    dtype: str
    ratio: float
    duomoe: float
    transformers: float
    settings: str  # of transformers


def run_duomoe(llm: LLM, prompt: list[int]) -> Run:
    """Generate with DuoMoE."""
    completion = llm.generate(prompt, SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True))[0]
    assert completion.metrics.tpot_s is not None
    return Run(completion.metrics.ttft_s, completion.metrics.tpot_s, completion.token_ids)


@torch.inference_mode()
def run_transformers(model: Any, cache: str, prompt: list[int]) -> Run:
    """Generate with transformers."""
    begin = time.perf_counter()
    options = {"max_cache_len": PROMPT_TOKENS + NEW_TOKENS} if cache == "static" else {}
    past = CACHES[cache](config=model.config, **options)
    tokens: list[int] = []
    step = torch.tensor([prompt])
    for _ in range(NEW_TOKENS):
        # The cache goes by its place, because its name changed within transformers 5.
        logits = model(step, None, None, past, use_cache=True, logits_to_keep=1).logits
        step = logits[:, -1].argmax(-1, keepdim=True)
        tokens.append(int(step))
        if len(tokens) == 1:
            first = time.perf_counter()
    return Run(first - begin, (time.perf_counter() - first) / (NEW_TOKENS - 1), tokens)


def combinations(dtype: torch.dtype, prompt: list[int]) -> dict[str, Callable[[], Run]]:
    """Return transformers with each combination of its settings, by name."""
    found: dict[str, Callable[[], Run]] = {}
    for attention, experts in itertools.product(ATTENTION, EXPERTS):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            EMBEDDED_MODEL, dtype=dtype, attn_implementation=attention, experts_implementation=experts
        ).eval()
        for cache in CACHES:
            name = f"attention {attention}, experts {experts}, cache {cache}"
            found[name] = lambda model=model, cache=cache: run_transformers(model, cache, prompt)
    return found


def times(runs: Sequence[Run], phase: str) -> list[float]:
    """Return the times of a phase."""
    return [getattr(run, phase) for run in runs]


def compare(dtype: str, rounds: int) -> list[Cell]:
    """Measure both phases in one dtype."""
    llm = LLM(device="cpu", dtype=dtype, prefix_caching=False)
    assert llm.tokenizer is not None
    prompt = llm.tokenizer.encode(TEXT.read_text(encoding="utf-8"))[:PROMPT_TOKENS]
    others = combinations(getattr(torch, dtype), prompt)
    screened = {name: [run() for _ in range(SCREENING)] for name, run in others.items()}
    fastest = {phase: min(others, key=lambda name: min(times(screened[name], phase))) for phase in PHASES}

    run_duomoe(llm, prompt)
    ours: list[Run] = []
    theirs: dict[str, list[Run]] = {name: [] for name in sorted(set(fastest.values()))}
    for _ in range(rounds):
        ours.append(run_duomoe(llm, prompt))
        for name, runs in theirs.items():
            runs.append(others[name]())
            # In bfloat16 either may round the other way, and go on with another text.
            assert dtype != "float32" or runs[-1].tokens == ours[-1].tokens, "they generated different tokens"
    cells = []
    for phase in PHASES:
        own, other = (statistics.median(times(runs, phase)) for runs in (ours, theirs[fastest[phase]]))
        cells.append(Cell(phase, dtype, other / own, own, other, fastest[phase]))
    return cells


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description="Compare DuoMoE with transformers on two CPU cores.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the cells there")
    args = parser.parse_args()

    torch.set_num_threads(THREADS)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    cells = [cell for dtype in ("float32", "bfloat16") for cell in compare(dtype, args.rounds)]
    print(
        f"{THREADS} threads, OMP_WAIT_POLICY {os.environ.get('OMP_WAIT_POLICY', 'unset')}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}; a prompt of {PROMPT_TOKENS} tokens, {NEW_TOKENS} new ones, "
        f"{args.rounds} rounds\n\n"
        "| phase | dtype | times as fast as transformers | its fastest settings |\n|---|---|---|---|"
    )
    for cell in cells:
        print(f"| {cell.phase} | {cell.dtype} | {cell.ratio:.2f} | {cell.settings} |")
    if args.json:
        args.json.write_text(json.dumps([asdict(cell) for cell in cells], indent=1) + "\n")


if __name__ == "__main__":
    main()
