"""A long prompt that arrives while others decode: how long they wait for their next tokens, and it for its first.

`python tests/benchmarks/long_prompt.py --model DIR --expert-memory 25% --prompt 16384 --sequences 4`
"""

import argparse
import random
import statistics
import threading
import time
from collections.abc import Sequence
from itertools import pairwise

from duomoe import LLM, SamplingParams


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line for each round."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    p.add_argument("--model", metavar="DIR", help="default: the embedded model")
    p.add_argument("--expert-memory", default="25%")
    p.add_argument("--prompt", type=int, default=512, help="tokens of the long prompt")
    p.add_argument("--sequences", type=int, default=4, help="that decode; 0 for the prompt alone")
    p.add_argument("--rounds", type=int, default=3)
    args = p.parse_args(argv)
    options = {"policy": "duo", "max_batch": args.sequences + 1, "max_model_len": args.prompt + 64}
    with LLM(args.model, expert_memory=args.expert_memory, **options) as llm:
        for _ in range(args.rounds + 1):  # the first compiles
            print(one_round(llm, args.prompt, args.sequences), flush=True)


def one_round(llm: LLM, prompt_tokens: int, sequences: int) -> str:
    """Let sequences decode, have a long prompt arrive, and say what both have waited for."""

    def prompt(length: int) -> list[int]:
        return [random.randrange(1000, 4000) for _ in range(length)]

    times: list[list[float]] = [[] for _ in range(sequences)]
    stop = threading.Event()

    def read(number: int) -> None:
        for _ in llm.stream(prompt(64), SamplingParams(max_new_tokens=prompt_tokens, ignore_eos=True, seed=number)):
            times[number].append(time.perf_counter())
            if stop.is_set():
                break

    readers = [threading.Thread(target=read, args=(number,)) for number in range(sequences)]
    for reader in readers:
        reader.start()
    while min(map(len, times), default=24) < 24:
        time.sleep(0.01)
    before = llm.stats().experts
    begin = time.perf_counter()
    llm.generate(prompt(prompt_tokens), SamplingParams(max_new_tokens=1))
    end = time.perf_counter()
    if not sequences:
        return f"TTFT {end - begin:.4f} s"
    time.sleep(20 * gap(times, 0.0, begin))
    stop.set()
    for reader in readers:
        reader.join()
    moved = llm.stats().experts.since(before)
    amid = sum(begin < at < end for each in times for at in each)
    longest = max(b - a for each in times for a, b in pairwise(each) if b > begin)
    return (
        f"TTFT {end - begin:.3f} s; TPOT before {1e3 * gap(times, 0.0, begin):.1f} ms, amid "
        f"{1e3 * gap(times, begin, end):.1f} ms ({amid} tokens), after {1e3 * gap(times, end, 1e99):.1f} ms; "
        f"longest gap {1e3 * longest:.1f} ms; MB streamed "
        f"{moved.streamed_bytes / 1e6:.0f}, on demand {moved.demand_bytes / 1e6:.0f}, "
        f"ahead {moved.prefetched_bytes / 1e6:.0f}"
    )


def gap(times: list[list[float]], begin: float, end: float) -> float:
    """Return the median time between two tokens of a sequence that ends within a span; 0 where there is none."""
    gaps = [b - a for each in times for a, b in pairwise(each) if begin < b < end]
    return statistics.median(gaps) if gaps else 0.0


if __name__ == "__main__":
    main()
