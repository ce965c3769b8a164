"""Draws are those of the sampler that sorted the vocabulary, so a seed gives the tokens that it always gave."""

import pytest
import torch

from duomoe.engine.sampler import CANDIDATES, Chances, Draw, choose


def mixed(x: int) -> int:
    """Scramble 64 bits, in Python's own numbers: the finaliser of SplitMix64."""
    mask = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
    return x ^ (x >> 31)


def by_sort(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, seed: int, position: int) -> int:
    """Draw from one row [vocab], as it was done before."""
    if temperature == 0:
        return int(logits.argmax())
    ordered, tokens = (logits / max(temperature, 1e-6)).sort(descending=True, stable=True)
    probabilities = ordered.softmax(-1)
    rank, before = torch.arange(len(logits)), probabilities.cumsum(-1) - probabilities
    kept = (rank < (top_k or len(logits))) & ((before < top_p) | (rank == 0))
    state = mixed(mixed(seed) ^ position)
    bits = torch.tensor([mixed(state ^ token) >> 41 & 0x7FFFFF for token in tokens.tolist()])
    uniform = (bits.float() + 0.5) * 2.0**-23
    noisy = (ordered - (-uniform.log()).log()).masked_fill(~kept, float("-inf"))
    return int(tokens[noisy.argmax()])


@pytest.mark.parametrize("vocab", [30, 500, 2 * CANDIDATES])
@pytest.mark.parametrize("ties", [False, True])
def test_a_seed_gives_the_tokens_that_it_gave(vocab: int, ties: bool) -> None:
    generator = torch.Generator().manual_seed(vocab)
    rows = 24
    logits = torch.randn(rows, vocab, generator=generator) * 3
    logits = logits.round() if ties else logits
    temperature, top_p = (torch.rand(rows, generator=generator) for _ in range(2))
    temperature[0], top_p[::4] = 0, 1
    top_k = torch.randint(1, min(vocab, CANDIDATES), (rows,), generator=generator)
    if vocab <= CANDIDATES:
        top_k[::3] = 0
    seed = torch.randint(2**61, 2**62, (rows,), generator=generator) * 2 + 1  # of all 63 bits
    position = torch.arange(rows) + 7
    options = (temperature, top_k, top_p, seed, position)
    expected = [by_sort(row, *(option[n].item() for option in options)) for n, row in enumerate(logits)]
    chances = Chances(temperature, top_k, top_p.double(), torch.zeros(rows), seed, position)
    for way in (Draw.FEW, Draw.ANY):
        assert choose(logits, way, chances).tolist() == expected
