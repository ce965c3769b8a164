"""Sampling: the right distribution, and no dependence on company."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duomoe import InputError, SamplingParams
from duomoe.sampling import sample


def draw(
    logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0
) -> torch.Tensor:
    rows = len(logits)
    return sample(
        logits,
        torch.full((rows,), temperature),
        torch.full((rows,), top_k),
        torch.full((rows,), top_p),
        torch.full((rows,), seed),
        torch.arange(rows),
    )


def shares(logits: torch.Tensor, **params: float) -> torch.Tensor:
    count = 40_000
    tokens = draw(logits.expand(count, -1), **params)  # type: ignore[arg-type]
    return torch.bincount(tokens, minlength=logits.shape[0]) / count


LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.0, -30.0, 0.0])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_shares_follow_the_softmax(temperature: float) -> None:
    expected = (LOGITS / temperature).softmax(-1)
    torch.testing.assert_close(shares(LOGITS, temperature=temperature), expected, atol=0.01, rtol=0)


def test_top_k_and_top_p_keep_the_likeliest() -> None:
    kept = torch.tensor([1.0, 0, 0, 1, 0, 0])
    expected = LOGITS.softmax(-1) * kept
    torch.testing.assert_close(shares(LOGITS, top_k=2), expected / expected.sum(), atol=0.01, rtol=0)
    # 0.52 + 0.19 of the whole: with 0.6 the second one is still needed, and no third.
    torch.testing.assert_close(shares(LOGITS, top_p=0.6), expected / expected.sum(), atol=0.01, rtol=0)
    assert (draw(LOGITS.expand(100, -1), top_p=1e-9) == 0).all()
    assert (draw(LOGITS.expand(100, -1), top_k=1, temperature=50.0) == 0).all()


def test_noise_never_revives_a_token_that_was_left_out() -> None:
    """With a large vocabulary some token's noise is the largest there is, at every few steps."""
    logits = torch.zeros(50, 150_000)
    logits[:, 5] = 100.0
    zeros = torch.zeros(50, dtype=torch.int64)
    for first in range(0, 400, 50):
        tokens = sample(logits, torch.ones(50), zeros + 1, torch.full((50,), 0.5), zeros + 7, first + torch.arange(50))
        assert (tokens == 5).all()


def test_zero_temperature_is_greedy_in_a_mixed_batch() -> None:
    logits = torch.randn(64, 30)
    temperature = torch.arange(64).remainder(2).float()
    zeros = torch.zeros(64, dtype=torch.int64)
    tokens = sample(logits, temperature, zeros, torch.ones(64), zeros, torch.arange(64))
    assert torch.equal(tokens[::2], logits.argmax(-1)[::2])
    assert not torch.equal(tokens[1::2], logits.argmax(-1)[1::2])


@given(rows=st.integers(1, 6), seed=st.integers(0, 2**63 - 1), temperature=st.floats(0.1, 5))
@settings(max_examples=30, deadline=None)
def test_a_row_does_not_depend_on_its_company(rows: int, seed: int, temperature: float) -> None:
    logits = torch.randn(rows, 50)
    seeds, positions = torch.full((rows,), seed), torch.arange(rows) + 3
    options = (torch.full((rows,), temperature), torch.full((rows,), 20), torch.full((rows,), 0.9), seeds, positions)
    together = sample(logits, *options)
    for row in range(rows):
        assert sample(logits[row : row + 1], *(option[row : row + 1] for option in options)) == together[row]


def test_a_single_stop_string_is_one_string() -> None:
    assert SamplingParams(stop="end").stop == ("end",)
    with pytest.raises(InputError):
        SamplingParams(max_new_tokens=True)
