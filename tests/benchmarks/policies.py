"""All policies side by side on one model: `make bench-policies`.

On a CPU the link is paced. Its speed is stated as a ratio: how many times as long an expert takes to cross as a layer
of a decode step takes to compute. For Mixtral-8x7B with AWQ weights over PCIe 4.0 it is about 10 (88 MB at 25 GB/s are
3.5 ms; a layer reads some 200 MB of device memory, 0.35 ms on an RTX A5000). There the ratios between policies count,
not the times. On a GPU (`--device cuda`) the link is what it is.

A cell is a ratio, a share of the experts that have slots, and a prompt length. In each round every policy runs once,
beginning with empty slots, in an order that rotates, so that drift of the machine hits all alike; a cell's figure is
the median of its rounds, and the spread half their range.

Bounds: TTFT cannot be below the transfer of the experts that the prompt needs, nor below the computation with all
experts resident. TPOT cannot be below the transfer of the misses of Belady's rule, which knows the future and here even
begins with the best possible slots, nor below the computation.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

from duomoe import LLM, SamplingParams
from duomoe.experts.link import Pace, Traffic
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
    """Return how many experts the prompt needs, and which each layer of each decode step does, numbered over all."""
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


def cells(full: bool, paced: bool) -> list[Cell]:
    """Return what to measure: all prompts and shares at the paper's ratio, and other ratios at one of them; or all."""
    shares, lengths = (0.10, 0.15, 0.25, 0.50), (16, 256, 2048)
    if not paced:
        return [Cell(0.0, share, tokens) for share in shares for tokens in lengths]
    if full:
        return [Cell(ratio, share, n) for ratio in (20.0, 10.0, 3.0, 1.0) for share in shares for n in lengths]
    return [Cell(10.0, s, n) for s in shares for n in lengths] + [Cell(r, 0.25, 256) for r in (20.0, 3.0, 1.0)]


def link_bandwidth() -> float:
    """Return the bytes per second of copies from pinned memory to the GPU."""
    source, target = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True), torch.empty(1 << 30, dtype=torch.uint8)
    target = target.cuda()
    target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    return source.nbytes / (time.perf_counter() - begin)


class Bench:
    """One model with all of its experts resident, and what a cell is compared with."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.paced = args.device == "cpu"
        # Each run computes its prompt from the first token on.
        self.options = dict(
            path=args.model, device=args.device, max_batch=1, max_model_len=args.max_model_len, prefix_caching=False
        )
        if self.paced:
            # One thread computes and one is the link. More would make computing depend on the copies.
            torch.set_num_threads(1)
            self.options["dtype"] = "bfloat16" if args.packed else "float32"
        self.whole = LLM(**self.options)
        config = self.whole.config
        self.experts = len(config.moe_layers) * config.num_experts
        self.row_bytes = self.whole.memory["expert_slots_bytes"] // self.experts
        if self.whole.tokenizer is None:
            self.text = torch.randint(config.vocab_size, (4096,), generator=torch.Generator().manual_seed(0)).tolist()
        else:
            self.text = self.whole.tokenizer.encode(TEXT.read_text(encoding="utf-8"))
        for _ in range(3):  # what is compiled and captured at first is not measured
            warm = run(self.whole, self.text[:256], args.new_tokens)[0]
        self.layer_time = warm.tpot / len(config.moe_layers)
        self.slots = 0
        self.bounded: dict[str, LLM] = {}
        self.formats = {"": "plain"} | ({", packed": "bf16-packed"} if args.packed else {})

    def prepare(self, slots: int) -> None:
        """Have an engine with that many slots for every policy."""
        if slots != self.slots:
            self.slots = slots
            self.bounded.clear()
            for policy, (suffix, expert_dtype) in product(self.args.policies, self.formats.items()):
                options = self.options | ({"link_bandwidth": "100GB/s"} if self.paced else {})
                llm = LLM(policy=policy, expert_memory=slots * self.row_bytes, expert_dtype=expert_dtype, **options)
                self.bounded[policy + suffix] = llm
                for _ in range(3):
                    run(llm, self.text[:64], 4)

    def measure(self, cell: Cell) -> None:
        """Run a cell and print its table."""
        self.prepare(int(cell.share * self.experts))
        new_tokens, prompt = self.args.new_tokens, self.text[: cell.prompt_tokens]
        bandwidth = self.row_bytes / (cell.ratio * self.layer_time) if self.paced else link_bandwidth()
        run(self.whole, prompt, new_tokens)
        computed, tokens = run(self.whole, prompt, new_tokens)
        needed, accesses = needs(self.whole, prompt, new_tokens)
        ttft_bound = max(needed * self.row_bytes / bandwidth, computed.ttft)
        belady = belady_misses(accesses, self.slots) / (new_tokens - 1)
        tpot_bound = max(belady * self.row_bytes / bandwidth, computed.tpot)

        runs: dict[str, list[Run]] = {policy: [] for policy in self.bounded}
        order = list(self.bounded)
        for turn in range(self.args.rounds + (not self.paced)):
            for policy in order[turn % len(order) :] + order[: turn % len(order)]:
                llm = self.bounded[policy]
                llm.policy.forget()  # every round begins with empty slots
                if self.paced:
                    llm.policy.lease.link.pace = Pace(bandwidth)
                found, same = run(llm, prompt, new_tokens)
                assert same == tokens, f"{policy} generated other tokens"
                if self.paced or turn > 0:  # on a GPU, the first round may compile
                    runs[policy].append(found)

        setting = f"ratio {cell.ratio:g}" if self.paced else f"{bandwidth / 1e9:.1f} GB/s"
        print(f"\n### {setting}, {self.slots} slots ({cell.share:.0%}), prompt of {cell.prompt_tokens} tokens\n")
        print(
            f"Bounds over all experts resident: TTFT {ttft_bound / computed.ttft:.2f}, "
            f"TPOT {tpot_bound / computed.tpot:.2f}."
        )
        if not self.paced:
            print(f"Resident: TTFT {computed.ttft * 1e3:.1f} ms, TPOT {computed.tpot * 1e3:.2f} ms.")
        print(
            "\n| policy | TTFT / bound | TPOT / bound | end to end / first | hits | MiB in prefill | on demand "
            "| prefetched, used | link idle in prefill | in decode |\n|---|---|---|---|---|---|---|---|---|---|"
        )
        reference = None
        for policy, found in runs.items():
            total = median(r.ttft + r.tpot * (new_tokens - 1) for r in found)
            reference = reference or total[0]
            print(row(policy, found, total, reference, ttft_bound, tpot_bound, bandwidth, new_tokens), flush=True)


def main() -> None:
    """Measure the cells that are asked for."""
    parser = argparse.ArgumentParser(description="Compare all policies; on a CPU over a paced link.")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--model", help="a folder in Hugging Face layout (default: the embedded model)")
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--full", action="store_true", help="every ratio with every share and prompt; takes hours")
    parser.add_argument("--cells", help="instead: RATIO:SHARE:PROMPT, separated by commas; on a GPU the ratio is 0")
    parser.add_argument("--policies", nargs="+", default=list(BOUNDED), choices=list(BOUNDED))
    parser.add_argument("--packed", action="store_true", help="each policy with bf16-packed experts, too")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=16)
    args = parser.parse_args()
    chosen = cells(args.full, args.device == "cpu")
    if args.cells:
        parts = [cell.split(":") for cell in args.cells.split(",")]
        chosen = [Cell(float(ratio), float(share), int(tokens)) for ratio, share, tokens in parts]
    bench = Bench(args)
    for cell in chosen:
        bench.measure(cell)


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
