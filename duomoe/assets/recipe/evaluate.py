"""Evaluate the exported model on the held-out text of every domain.

    python evaluate.py --corpus ./corpus --model ./model --out evaluation.json

Reports bits per byte beside two baselines (an interpolated Kneser-Ney 3-gram model over the same
tokens, and ``xz -9``), how evenly the experts are used, how differently the domains use them, and
one sample per domain.
"""

from __future__ import annotations

import argparse
import itertools
import json
import lzma
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from moe import MoeModel, load_exported
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from vocab import CONTEXT, END_OF_TEXT, END_OF_TEXT_ID, VOCAB_SIZE, Tokens, encode, read_corpus

PROMPTS = {
    "novels": "Emma was not at all surprised when Mr. Knightley",
    "drama": "KING RICHARD\nMy lords, the night is",
    "essays": "For anarchists, the state is",
    "speeches": "Fellow citizens of the Senate and House of Representatives:\n\nDuring the past year",
    "scripture": "And it came to pass in those days, that",
    "dictionary": 'Lantern \\Lan"tern\\, n.',
    "docs": "The ``timeout`` option",
    "python": 'def read_config(path):\n    """',
    "c": "static int device_open(struct inode *inode, struct file *file)\n{",
    "javascript": "/**\n * Returns the",
}


@torch.inference_mode()
def bits_per_byte(
    model: MoeModel, tokens: Tokens, text_bytes: int, device: torch.device, context: int = CONTEXT
) -> tuple[float, Tensor]:
    """Bits per byte of a token stream, and the expert loads of every window [windows, layers, experts].

    The stream is cut into windows of ``context`` tokens that do not overlap; every token is scored once.
    The bits of the end-of-text tokens count, their bytes do not.
    """
    stream = torch.from_numpy(tokens.astype("int64"))
    inputs = torch.cat((torch.tensor([END_OF_TEXT_ID]), stream[:-1]))
    nats = 0.0
    window_loads: list[Tensor] = []
    for start in range(0, len(stream), context):
        window = inputs[start : start + context].to(device)[None]
        targets = stream[start : start + context].to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            logits, _, loads = model(window)
        nats += F.cross_entropy(logits[0].float(), targets, reduction="sum").item()
        if window.shape[1] == context:
            window_loads.append(loads.float().cpu())
    return nats / math.log(2) / text_bytes, torch.stack(window_loads) if window_loads else torch.empty(0)


class Trigram:
    """Interpolated Kneser-Ney 3-gram model over tokens, one absolute discount per order."""

    def __init__(self, tokens: Tokens) -> None:
        ids = tokens.astype(np.int64)
        keys = (ids[:-2] * VOCAB_SIZE + ids[1:-1]) * VOCAB_SIZE + ids[2:]
        self.levels = []  # highest order first: (keys, counts, context keys, context sums, context types, discount)
        counts = None
        for order in (3, 2, 1):
            if order == 3:
                unique, counts = np.unique(keys, return_counts=True)
            else:  # continuation counts: distinct contexts to the left
                unique, counts = np.unique(unique % VOCAB_SIZE**order, return_counts=True)
            contexts, first = np.unique(unique // VOCAB_SIZE, return_index=True)
            sums = np.add.reduceat(counts, first)
            types = np.diff(np.append(first, len(unique)))
            ones, twos = int((counts == 1).sum()), int((counts == 2).sum())
            discount = ones / max(1, ones + 2 * twos)
            self.levels.append((unique, counts, contexts, sums, types, discount))

    def probabilities(self, tokens: Tokens) -> NDArray[np.float64]:
        """Probability of every token of a stream given the two before it."""
        ids = np.concatenate(([END_OF_TEXT_ID, END_OF_TEXT_ID], tokens)).astype(np.int64)
        target = ids[2:]
        probability = np.full(len(target), 1.0 / VOCAB_SIZE)
        histories = {1: np.zeros_like(target), 2: ids[1:-1], 3: ids[:-2] * VOCAB_SIZE + ids[1:-1]}
        for order, level in zip((1, 2, 3), reversed(self.levels), strict=True):
            unique, counts, contexts, sums, types, discount = level
            history = histories[order]
            found, where = lookup(contexts, history)
            total, kinds = sums[where], types[where]
            known, at = lookup(unique, history * VOCAB_SIZE + target)
            count = np.where(known, counts[at], 0)
            mixed = np.maximum(count - discount, 0) / total + discount * kinds / total * probability
            probability = np.where(found, mixed, probability)
        return probability

    def bits_per_byte(self, tokens: Tokens, text_bytes: int) -> float:
        """Bits per byte of a token stream."""
        return float(-np.log2(self.probabilities(tokens)).sum() / text_bytes)


def lookup(table: NDArray[np.int64], keys: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Whether each key is in the sorted table, and where (any place if it is not)."""
    where = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return table[where] == keys, where


def expert_report(loads: dict[str, Tensor]) -> dict[str, object]:
    """Balance of the experts over all domains, and distance between the domains' use of them."""
    usage = {domain: windows.mean(0) for domain, windows in loads.items()}
    overall = torch.stack(list(usage.values())).mean(0)

    def distance(first: Tensor, second: Tensor) -> float:
        return float((0.5 * (first - second).abs().sum(-1)).mean())

    between = [distance(usage[a], usage[b]) for a, b in itertools.combinations(usage, 2)]
    within = [distance(w[: len(w) // 2].mean(0), w[len(w) // 2 :].mean(0)) for w in loads.values()]
    shuffled = [distance(w[0::2].mean(0), w[1::2].mean(0)) for w in loads.values()]
    return {
        "share_min_per_layer": overall.min(-1).values.tolist(),
        "share_max_per_layer": overall.max(-1).values.tolist(),
        "even_share": 1.0 / overall.shape[-1],
        "dead_experts": int((torch.stack(list(usage.values())).amax(0) == 0).sum()),
        "distance_between_domains": sum(between) / len(between),
        "distance_between_halves": sum(within) / len(within),
        "distance_between_alternate_windows": sum(shuffled) / len(shuffled),
        "usage": {domain: value.tolist() for domain, value in usage.items()},
    }


@torch.inference_mode()
def generate(
    model: MoeModel, tokenizer: Tokenizer, prompt: str, count: int, temperature: float, seed: int, top_p: float = 1.0
) -> str:
    """Continue a prompt (without a cache: every step runs the whole text again)."""
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    ids = [END_OF_TEXT_ID, *tokenizer.encode(prompt).ids]
    for _ in range(count):
        logits = model(torch.tensor([ids], device=device))[0][0, -1].float()
        if temperature == 0:
            token = int(logits.argmax())
        else:
            probabilities, order = (logits / temperature).softmax(-1).sort(descending=True)
            probabilities[probabilities.cumsum(-1) - probabilities > top_p] = 0
            token = int(order[torch.multinomial(probabilities, 1, generator=generator)])
        if token == END_OF_TEXT_ID:
            break
        ids.append(token)
    text: str = tokenizer.decode(ids[1:])
    return text


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Evaluate the embedded model.")
    parser.add_argument("--corpus", type=Path, default=Path("corpus"))
    parser.add_argument("--model", type=Path, default=Path("model"))
    parser.add_argument("--out", type=Path, default=Path("evaluation.json"))
    parser.add_argument("--sample-tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
    model = load_exported(arguments.model).to(device).eval()

    train = {domain: encode(tokenizer, text) for domain, text in read_corpus(arguments.corpus, "train").items()}
    trigram = Trigram(np.concatenate(list(train.values())))
    rows: dict[str, dict[str, float]] = {}
    loads: dict[str, Tensor] = {}
    print(f"{'domain':11s} {'model':>7s} {'3-gram':>7s} {'own':>7s} {'xz -9':>7s}   bits per byte")
    for domain, text in read_corpus(arguments.corpus, "heldout").items():
        tokens = encode(tokenizer, text)
        plain = text.replace(END_OF_TEXT, "\n").encode()
        size = len(text.replace(END_OF_TEXT, "").encode())
        score, loads[domain] = bits_per_byte(model, tokens, size, device)
        rows[domain] = {
            "heldout_bytes": size,
            "heldout_tokens": len(tokens),
            "model": score,
            "trigram_all_domains": trigram.bits_per_byte(tokens, size),
            "trigram_this_domain": Trigram(train[domain]).bits_per_byte(tokens, size),
            "xz": 8 * len(lzma.compress(plain, preset=9)) / size,
        }
        row = rows[domain]
        columns = (row["model"], row["trigram_all_domains"], row["trigram_this_domain"], row["xz"])
        print(f"{domain:11s} " + " ".join(f"{value:7.3f}" for value in columns), flush=True)
    experts = expert_report(loads)
    print(json.dumps({key: value for key, value in experts.items() if key != "usage"}, indent=1))
    samples: dict[str, dict[str, str]] = {}
    for domain, prompt in PROMPTS.items():
        samples[domain] = {
            kind: generate(model, tokenizer, prompt, arguments.sample_tokens, temperature, arguments.seed)
            for kind, temperature in (("sampled", arguments.temperature), ("greedy", 0.0))
        }
        for kind, text in samples[domain].items():
            print(f"--- {domain}, {kind}\n{text}\n", flush=True)
    report = {"domains": rows, "experts": experts, "samples": samples}
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
