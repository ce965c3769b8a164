"""How the next token is chosen: greedily, or from the k most likely or the top-p nucleus at a temperature.

Sampling is the Gumbel trick with noise that is a hash of (seed, position, token). It needs no generator state, so a
sequence draws the same tokens whatever else is in its batch, and no host synchronisation.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from duomoe.errors import InputError


@dataclass(frozen=True)
class SamplingParams:
    """What a request asks for; fields are named as the command line's flags.

    Raises:
        InputError: when a value is out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # 0 keeps every token
    top_p: float = 1.0
    seed: int | None = None  # None draws one
    stop: Sequence[str] = field(default=())  # strings that end the text; they are not part of it
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.stop, str | list | tuple) or not all(isinstance(s, str) and s for s in self.stop):
            raise InputError("--stop must be text that is not empty, or a list of such texts")
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        if not _is_int(self.max_new_tokens) or self.max_new_tokens < 1:
            raise InputError(f"--max-new-tokens must be a whole number of at least 1, got {self.max_new_tokens!r}")
        if not _is_number(self.temperature) or not 0 <= self.temperature <= 1e6:
            raise InputError(f"--temperature must be a number from 0 to a million, got {self.temperature!r}")
        if not _is_int(self.top_k) or not 0 <= self.top_k < 2**31:
            raise InputError(f"--top-k must be a whole number from 0, for no limit, to 2**31 - 1, got {self.top_k!r}")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise InputError(f"--top-p must be a number above 0 and at most 1, got {self.top_p!r}")
        if self.seed is not None and (not _is_int(self.seed) or not 0 <= self.seed < 2**63):
            raise InputError(f"--seed must be a whole number from 0 to 2**63 - 1, got {self.seed!r}")


def sample(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    """Choose one token for each row.

    Args:
        logits: [rows, vocab] float32.
        temperature: [rows] float32; 0 takes the most likely token.
        top_k: [rows] int64; 0 keeps every token.
        top_p: [rows] float32; the smallest set of most likely tokens whose probability reaches it is kept.
        seed: [rows] int64.
        position: [rows] int64, where the new token will stand in its sequence.

    Returns:
        [rows] int64.
    """
    vocab = logits.shape[1]
    scaled = logits / temperature.clamp(min=1e-6)[:, None]
    ordered, tokens = scaled.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(vocab, device=logits.device)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    limit = torch.where(top_k > 0, top_k, vocab)
    kept = (rank < limit[:, None]) & ((before < top_p[:, None]) | (rank == 0))
    noisy = (ordered + _gumbel(seed, position, tokens)).masked_fill(~kept, float("-inf"))
    drawn = tokens.gather(1, noisy.argmax(-1, keepdim=True)).squeeze(1)
    return torch.where(temperature > 0, drawn, logits.argmax(-1))


def _gumbel(seed: Tensor, position: Tensor, tokens: Tensor) -> Tensor:
    """Return Gumbel noise [rows, vocab], a pure function of (seed, position, token)."""
    state = _mix(_mix(_mix(seed) ^ position)[:, None] ^ tokens)
    # 23 random bits and a half are exact in float32: a uniform number in (0, 1), never an end of the interval.
    uniform = ((state >> 41) & 0x7FFFFF).to(torch.float32).add_(0.5).mul_(2.0**-23)
    return -(-uniform.log()).log()


def _mix(x: Tensor) -> Tensor:
    """Scramble int64 values: the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), wrapping on overflow."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _signed(constant: int) -> int:
    """Return a 64-bit constant as the int64 with the same bits."""
    return constant - (1 << 64) if constant >= 1 << 63 else constant


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
