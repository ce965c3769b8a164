"""The next token of each sequence, from logits: changed as its request asks, then the likeliest or one that is drawn.

A draw is the Gumbel trick with noise that is a hash of (seed, position, token): it needs no generator. Probabilities
are whole numbers of a fixed unit, whose sums have no order. So, for the same logits, a sequence draws the same token
whatever else is in its batch, and by whichever of the ways below. Logits themselves are the same where the schedule is:
how many rows stood together decides which tiles a kernel takes, which in bfloat16 moves the last bits of a logit, and
may move a draw. Nothing here waits for the host, and nothing sorts the vocabulary.
"""

from collections.abc import Iterable
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from duomoe.sampling import SamplingParams

# How many of the likeliest tokens are looked at where no row may keep more.
CANDIDATES = 4096

# The unit of probabilities, as a share of the likeliest token's; sums over any vocabulary stay below 2**63.
UNIT = 2.0**-40

# Over so many histograms the tokens of a row are spread.
HISTOGRAMS = 32


class Draw(IntEnum):
    """How tokens are chosen; each way serves what those before it serve."""

    GREEDY = 0  # the likeliest
    FEW = 1  # of the CANDIDATES likeliest
    ANY = 2  # of any number


class Needs(NamedTuple):
    """What the sampling of a batch has to do."""

    draw: Draw
    adjusts: bool  # penalties, biases and masks
    logprobs: bool

    def serves(self, others: "Needs") -> bool:
        """Return whether who does this does the others, too."""
        return all(mine >= theirs for mine, theirs in zip(self, others, strict=True))


def needs_of(batch: Iterable[SamplingParams], vocab: int) -> Needs:
    """Return what sampling for requests with such parameters has to do."""
    draw, adjusts, logprobs = Draw.GREEDY, False, False
    for params in batch:
        if params.temperature > 0:
            few = vocab <= CANDIDATES or 0 < params.top_k <= CANDIDATES
            draw = max(draw, Draw.FEW if few else Draw.ANY)
        adjusts = adjusts or params.changes_logits
        logprobs = logprobs or params.logprobs is not None
    return Needs(draw, adjusts, logprobs)


class Adjustments(NamedTuple):
    """What changes the logits of each row.

    Attributes:
        bias: [rows, vocab] float32, added first.
        seen: [rows, vocab] int32, of each token twice the times it is in the output, and one more if in the prompt.
        allowed: [rows, ceil(vocab / 32)] int32, a bit for each token.
        repetition: [rows] float32, as the two below.
    """

    bias: Tensor
    seen: Tensor
    allowed: Tensor
    repetition: Tensor
    presence: Tensor
    frequency: Tensor


def adjust(logits: Tensor, by: Adjustments) -> Tensor:
    """Return logits [rows, vocab] float32 with biases, penalties and masks."""
    logits = logits + by.bias
    repetition = torch.where(by.seen > 0, by.repetition[:, None], 1.0)
    logits = torch.where(logits > 0, logits / repetition, logits * repetition)
    count = by.seen >> 1
    logits -= by.frequency[:, None] * count
    logits -= by.presence[:, None] * (count > 0)
    bits = torch.arange(32, dtype=torch.int32, device=logits.device)
    allowed = ((by.allowed[:, :, None] >> bits) & 1).flatten(1)[:, : logits.shape[1]]
    return logits.masked_fill_(allowed == 0, float("-inf"))


class Chances(NamedTuple):
    """What each row's token is drawn by; all [rows].

    Attributes:
        temperature: float32; 0 takes the likeliest token.
        top_k: int64; 0 keeps every token.
        top_p: float64; the smallest set of likeliest tokens whose probability reaches it is kept; 1 keeps every token.
        min_p: float32; tokens are kept whose probability is at least this share of the likeliest one's.
        seed: int64.
        position: int64, where the new token will stand in its sequence.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor
    position: Tensor


def choose(logits: Tensor, draw: Draw, chances: Chances | None) -> Tensor:
    """Choose one token for each row; of equally likely ones, those with lower numbers are kept first.

    Args:
        logits: [rows, vocab] float32.
        draw: how. FEW needs a top-k of 1 to CANDIDATES in all rows with a temperature, or a vocabulary of at most
            CANDIDATES.
        chances: by what; GREEDY needs none.

    Returns:
        [rows] int64.
    """
    likeliest = logits.argmax(-1)
    if draw == Draw.GREEDY or chances is None:
        return likeliest
    scaled = logits / chances.temperature.clamp(min=1e-6)[:, None]
    share = (scaled - scaled.amax(-1, keepdim=True)).exp()
    units = (share / UNIT).to(torch.int64)
    total = units.sum(-1)
    limits = _Limits(
        torch.where(chances.top_k > 0, chances.top_k, logits.shape[1]),
        torch.where(chances.top_p < 1, (chances.top_p * total).ceil().to(torch.int64), total + 1),
    )
    scaled = scaled.masked_fill_(share < chances.min_p[:, None], float("-inf"))
    drawn = (_of_few if draw == Draw.FEW else _of_any)(scaled, units, limits, chances)
    return torch.where(chances.temperature > 0, drawn, likeliest)


class _Limits(NamedTuple):
    """A token is kept that has fewer than `most` likelier ones, of fewer than `units` together; both [rows] int64."""

    most: Tensor
    units: Tensor

    def keep(self, likelier: Tensor, with_units: Tensor) -> Tensor:
        """Return which tokens are kept; all are [rows, tokens]."""
        return (likelier < self.most[:, None]) & (with_units < self.units[:, None])


def _of_few(scaled: Tensor, units: Tensor, limits: _Limits, chances: Chances) -> Tensor:
    """Draw from the CANDIDATES likeliest tokens of each row."""
    vocab = scaled.shape[1]
    token = torch.arange(vocab, device=scaled.device)
    # One number for logit and token, all different, so that equal logits have an order.
    keys = (_ordered(scaled).to(torch.int64) << 32) | (vocab - 1 - token)
    tokens = vocab - 1 - (keys.topk(min(vocab, CANDIDATES)).values & 0xFFFFFFFF)
    own = units.gather(1, tokens)
    rank = torch.arange(tokens.shape[1], device=scaled.device).expand_as(tokens)
    kept = limits.keep(rank, own.cumsum(-1) - own)
    noisy = scaled.gather(1, tokens) + _gumbel(chances.seed, chances.position, tokens)
    noisy = noisy.masked_fill_(~kept, float("-inf"))
    # Of equals the lowest, as below.
    return tokens.masked_fill(noisy < noisy.amax(-1, keepdim=True), vocab - 1).amin(-1)


def _of_any(scaled: Tensor, units: Tensor, limits: _Limits, chances: Chances) -> Tensor:
    """Draw from all tokens of each row, having searched for the least likely one that is kept."""
    keys = _ordered(scaled).to(torch.int64)
    lowest, count, mass = _lowest_kept(keys, units, limits)
    equal = keys == lowest
    before = equal.cumsum(-1) - 1  # of the equal ones
    own = units.gather(1, equal.to(torch.int8).argmax(-1, keepdim=True))
    kept = (keys > lowest) | (equal & limits.keep(count + before, mass + before * own))
    noisy = scaled + _gumbel(chances.seed, chances.position, torch.arange(scaled.shape[1], device=scaled.device))
    return noisy.masked_fill_(~kept, float("-inf")).argmax(-1)


def _lowest_kept(keys: Tensor, units: Tensor, limits: _Limits) -> tuple[Tensor, Tensor, Tensor]:
    """Search each row for the least key of which a token is kept, eight bits of the key at a time.

    Sums are of whole numbers, so the order in which a GPU adds them up does not matter.

    Args:
        keys: [rows, vocab] int64 that int32 could hold, the order of the tokens.
        units: [rows, vocab] int64, of each token.
        limits: what is kept.

    Returns:
        That key, the number of tokens with greater keys, and their units, each int64 [rows, 1].
    """
    rows, vocab = keys.shape
    # Each token adds to one of several histograms, because additions to one place wait for each other on a GPU.
    copy = torch.arange(vocab, device=keys.device) % HISTOGRAMS * 256
    one = torch.ones((), dtype=torch.int64, device=keys.device).expand(rows, vocab)
    lowest, count, mass = (torch.zeros(rows, 1, dtype=torch.int64, device=keys.device) for _ in range(3))
    keys = keys + 2**31  # from 0
    for shift in (24, 16, 8, 0):
        place = ((keys >> shift) & 255) + copy
        place.masked_fill_((keys >> (shift + 8)) != lowest, HISTOGRAMS * 256)  # a place that is not read
        counts, masses = (_histogram(place, each) for each in (one, units))
        # With smaller digits first, what stands behind a digit is likelier.
        likelier = count + counts.flip(-1).cumsum(-1).flip(-1) - counts
        with_units = mass + masses.flip(-1).cumsum(-1).flip(-1) - masses
        kept = limits.keep(likelier, with_units) & (counts > 0)
        digit = kept.to(torch.int8).argmax(-1, keepdim=True)  # the first
        lowest, count, mass = (lowest << 8) | digit, likelier.gather(1, digit), with_units.gather(1, digit)
    return lowest - 2**31, count, mass


def _histogram(place: Tensor, weight: Tensor) -> Tensor:
    """Add up weights [rows, vocab] by their last eight bits of place; return int64 [rows, 256]."""
    sums = torch.zeros(len(place), (HISTOGRAMS + 1) * 256, dtype=torch.int64, device=place.device)
    sums.scatter_add_(1, place, weight)
    return sums[:, : HISTOGRAMS * 256].reshape(-1, HISTOGRAMS, 256).sum(1)


def _ordered(values: Tensor) -> Tensor:
    """Return whole numbers in the order of float32 values, equal for equal ones, int32."""
    bits = (values + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _gumbel(seed: Tensor, position: Tensor, tokens: Tensor) -> Tensor:
    """Return Gumbel noise [rows, tokens], a pure function of (seed, position, token)."""
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
