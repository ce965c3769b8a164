"""All policies side by side on the embedded model, over a link that is paced: `make bench-policies`.

The link's speed is stated as a ratio: how many times as long an expert takes to cross as a layer of a decode step takes
to compute. For Mixtral-8x7B with AWQ weights over PCIe 4.0 it is about 10 (88 MB at 25 GB/s are 3.5 ms; a layer reads
some 200 MB of device memory, 0.35 ms on an RTX A5000). Every figure is measured on the machine at hand and paced: the ratios between policies count,
not the times.

A cell is a ratio, a share of the experts that have slots, and a prompt length. In each round every policy runs once, in an
order that rotates, so that drift of the machine hits all alike; a cell's figure is the median of its rounds, with half the range as the spread.

Bounds: TTFT cannot be below the transfer of what the prompt needs and slots lack, nor below the computation with all
experts resident. TPOT cannot be below the transfer of the misses of Belady's rule (which knows the future, and starts with the best possible
slots), nor below the computation.
"""

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from duomoe import LLM, SamplingParams
from duomoe.experts.link import Traffic
from duomoe.experts.policies import BOUNDED
from duomoe.experts.trace import Recorder

TEXT = Path(__file__).parents[2] / "docs" / "design.md"  # the model has not seen it


@dataclass(frozen=True)
class Cell:
    """What is varied."""

    ratio: float
    share: float
    prompt_tokens: int


@dataclass(frozen=True)
class Run:
    """What one request took: seconds, and what crossed the link until the first token and after it."""

    ttft: float
    tpot: float
    prefill: Traffic
    decode: Traffic


def run(llm: LLM, prompt: Sequence[int], new_tokens: int) -> tuple[Run, list[int]]:
    """Generate greedily and measure; return the tokens, too."""
    before = llm.policy.traffic_so_far()
    begin = time.perf_counter()
    tokens, at_first = [], 0.0
    for chunk in llm.stream(prompt, SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)):
        if not tokens:
            at_first = time.perf_counter()
            first = llm.policy.traffic_so_far()
        tokens.append(chunk.token_id)
    end = time.perf_counter()
    after = llm.policy.traffic_so_far()
    tpot = (end - at_first) / (new_tokens - 1)
    return Run(at_first - begin, tpot, first.since(before), after.since(first)), tokens


def needs(llm: LLM, prompt: Sequence[int], new_tokens: int) -> tuple[int, list[list[int]]]:
    """Return how many experts the prompt needs, and which ones each layer of each decode step does, numbered over all."""
    recorder = Recorder(len(llm.config.moe_layers), with_hidden=False)
    recorder.begin()
    llm.policy.observer = recorder.observe
    run(llm, prompt, new_tokens)
    llm.policy.observer = None
    experts = recorder.trace("", llm.config.num_experts).experts.long()  # [tokens, layers, top_k]
    numbers = experts + torch.arange(experts.shape[1])[:, None] * llm.config.num_experts
    return len(numbers[: len(prompt)].unique()), numbers[len(prompt) :].flatten(0, 1).tolist()


def belady_misses(accesses: Sequence[Iterable[int]], slots: int) -> int:
    """Return how many misses are the least possible, with slots that begin with whatever is best."""
    uses: dict[int, list[int]] = defaultdict(list)
    for when, experts in enumerate(accesses):
        for expert in experts:
            uses[expert].append(when)
    for times in uses.values():
        times.reverse()  # the next use is the last entry

    def next_use(expert: int) -> float:
        return uses[expert][-1] if uses[expert] else float("inf")

    resident = set(sorted(uses, key=next_use)[:slots])
    misses = 0
    for experts in accesses:
        for expert in experts:
            uses[expert].pop()
        for expert in set(experts) - resident:
            misses += 1
            if len(resident) >= slots:
                # What this step uses may go, too, once it is computed; but not before.
                candidates = resident - set(experts)
                if not candidates:
                    continue
                resident.remove(max(candidates, key=next_use))
            resident.add(expert)
    return misses


def median(values: Iterable[float]) -> tuple[float, float]:
    """Return the median and half the range."""
    found = sorted(values)
    return statistics.median(found), (found[-1] - found[0]) / 2


def cells(full: bool) -> list[Cell]:
    """Return what to measure: all prompts and shares at the paper's ratio, and other ratios at one of them; or all."""
    shares, lengths, ratios = (0.10, 0.15, 0.25, 0.50), (16, 256, 2048), (20.0, 10.0, 3.0, 1.0)
    if full:
        return [Cell(r, s, n) for r in ratios for s in shares for n in lengths]
    return [Cell(10.0, s, n) for s in shares for n in lengths] + [Cell(r, 0.25, 256) for r in (20.0, 3.0, 1.0)]


def main() -> None:
    """Measure and print a Markdown table for each cell."""
    parser = argparse.ArgumentParser(description="Compare all policies over a paced link.")
    parser.add_argument("--full", action="store_true", help="every ratio with every share and prompt; takes hours")
    parser.add_argument("--cell", nargs=3, type=float, metavar=("RATIO", "SHARE", "PROMPT"), help="only this one")
    parser.add_argument("--policies", nargs="+", default=list(BOUNDED), choices=list(BOUNDED))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=16)
    args = parser.parse_args()

    # Two threads: one computes and one is the link. More would make the computation's time depend on the copies.
    torch.set_num_threads(1)
    whole = LLM(device="cpu", dtype="float32")
    rows = len(whole.config.moe_layers) * whole.config.num_experts
    row_bytes = whole.memory["expert_slots_bytes"] // rows
    assert whole.tokenizer is not None
    text = whole.tokenizer.encode(TEXT.read_text(encoding="utf-8"))
    layers = len(whole.config.moe_layers)
    run(whole, text[:16], args.new_tokens)
    layer_time = min(run(whole, text[:256], args.new_tokens)[0].tpot for _ in range(3)) / layers

    chosen = [Cell(args.cell[0], args.cell[1], int(args.cell[2]))] if args.cell else cells(args.full)
    for cell in chosen:
        bandwidth = row_bytes / (cell.ratio * layer_time)
        slots = int(cell.share * rows)
        prompt = text[: cell.prompt_tokens]
        computed, tokens = run(whole, prompt, args.new_tokens)
        needed, accesses = needs(whole, prompt, args.new_tokens)
        ttft_bound = max(needed * row_bytes / bandwidth, computed.ttft)
        belady = belady_misses(accesses, slots) / (args.new_tokens - 1)
        tpot_bound = max(belady * row_bytes / bandwidth, computed.tpot)

        runs: dict[str, list[Run]] = {policy: [] for policy in args.policies}
        for turn in range(args.rounds):
            for policy in args.policies[turn % len(args.policies) :] + args.policies[: turn % len(args.policies)]:
                llm = LLM(
                    device="cpu", dtype="float32", policy=policy, expert_memory=slots * row_bytes,
                    link_bandwidth=int(bandwidth),
                )  # fmt: skip
                found, same = run(llm, prompt, args.new_tokens)
                assert same == tokens, f"{policy} generated other tokens"
                runs[policy].append(found)

        print(
            f"\n### ratio {cell.ratio:g}, {cell.share:.0%} of the experts ({slots} slots), "
            f"prompt of {cell.prompt_tokens} tokens\n"
        )
        print(f"Resident: TTFT 1, TPOT 1. Bounds: TTFT {ttft_bound / computed.ttft:.2f}, "
              f"TPOT {tpot_bound / computed.tpot:.2f}.\n")  # fmt: skip
        print(
            "| policy | TTFT / bound | TPOT / bound | end to end / on_demand | hits | MiB prefill | demand | prefetched, used | link idle, prefill | decode |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|")
        reference = None
        for policy, found in runs.items():
            total = median(r.ttft + r.tpot * (args.new_tokens - 1) for r in found)
            reference = reference or total[0]
            print(row(policy, found, total, reference, ttft_bound, tpot_bound, bandwidth, args.new_tokens))
        sys.stdout.flush()


def row(
    policy: str,
    runs: list[Run],
    total: tuple[float, float],
    reference: float,
    ttft_bound: float,
    tpot_bound: float,
    bandwidth: float,
    new_tokens: int,
) -> str:
    """Return a policy's line of the table."""

    def ratio(values: tuple[float, float], of: float) -> str:
        return f"{values[0] / of:.2f} ± {values[1] / of:.2f}"

    typical = runs[len(runs) // 2]
    decode, mib = typical.decode, 2**20
    hits = decode.hits / max(1, decode.hits + decode.misses)
    idle = [median(1 - r.prefill.link_bytes / bandwidth / r.ttft for r in runs)[0]]
    idle.append(median(1 - r.decode.link_bytes / bandwidth / (r.tpot * (new_tokens - 1)) for r in runs)[0])
    return " | ".join(
        [
            f"| `{policy}`",
            ratio(median(r.ttft for r in runs), ttft_bound),
            ratio(median(r.tpot for r in runs), tpot_bound),
            ratio(total, reference),
            f"{hits:.2f}",
            f"{typical.prefill.link_bytes / mib:.1f}",
            f"{decode.demand_bytes / mib:.1f}",
            f"{decode.prefetched_bytes / mib:.1f}, {decode.prefetch_used_bytes / mib:.1f}",
            f"{idle[0]:.0%}",
            f"{idle[1]:.0%} |",
        ]
    )


if __name__ == "__main__":
    main()
