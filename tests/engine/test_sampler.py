"""Sampling: the right tokens are kept and drawn, in whatever way and company; logits are changed as they should be."""

from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from duomoe.engine.logprobs import logprobs_of
from duomoe.engine.sampler import CANDIDATES, Adjustments, Chances, Draw, adjust, choose, needs_of
from duomoe.sampling import SamplingParams


def chances(
    rows: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, seed: int = 0
) -> Chances:
    return Chances(
        temperature=torch.full((rows,), temperature),
        top_k=torch.full((rows,), top_k),
        top_p=torch.full((rows,), top_p, dtype=torch.float64),
        min_p=torch.full((rows,), min_p),
        seed=torch.full((rows,), seed),
        position=torch.arange(rows),
    )


def draw(logits: torch.Tensor, way: Draw = Draw.ANY, **options: Any) -> torch.Tensor:
    return choose(logits, way, chances(len(logits), **options))


def shares(logits: torch.Tensor, **options: Any) -> torch.Tensor:
    count = 40_000
    tokens = draw(logits.expand(count, -1), Draw.FEW, **options)
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
    for way in (Draw.FEW, Draw.ANY):
        assert (draw(LOGITS.expand(100, -1), way, top_p=1e-9) == 0).all()
        assert (draw(LOGITS.expand(100, -1), way, top_k=1, temperature=50.0) == 0).all()


def test_noise_never_revives_a_token_that_was_left_out() -> None:
    """With a large vocabulary some token's noise is the largest there is, at every few steps."""
    logits = torch.zeros(50, 150_000)
    logits[:, 5] = 100.0
    for seed in range(4):
        assert (draw(logits, top_k=1, top_p=0.5, seed=seed) == 5).all()


def test_zero_temperature_is_greedy_in_a_mixed_batch() -> None:
    logits = torch.randn(64, 30)
    mixed = chances(64)._replace(temperature=torch.arange(64).remainder(2).float())
    tokens = choose(logits, Draw.FEW, mixed)
    assert torch.equal(tokens[::2], logits.argmax(-1)[::2])
    assert not torch.equal(tokens[1::2], logits.argmax(-1)[1::2])


# Few values, so that there are ties, and sums that meet a top-p exactly.
rows_of_logits = st.lists(st.integers(-3, 3), min_size=1, max_size=40)


@given(values=rows_of_logits, top_k=st.integers(0, 45), top_p=st.floats(0.01, 1), min_p=st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_what_can_be_drawn_is_what_a_sort_keeps(values: list[int], top_k: int, top_p: float, min_p: float) -> None:
    """Over many seeds, each way draws the same tokens, only kept ones, and all kept ones that are likely at all."""
    logits = torch.tensor(values, dtype=torch.float32)
    weights = [2.718281828459045**value for value in values]
    order = sorted(range(len(values)), key=lambda token: (-values[token], token))  # of equals the lower number first
    total, before, kept, edge = sum(weights), 0.0, set(), set()
    for rank, token in enumerate(order):
        if abs(before - top_p * total) < 1e-6 * total or abs(weights[token] - min_p * max(weights)) < 1e-6:
            edge.add(token)  # rounding decides
        nucleus = rank == 0 or ((not top_k or rank < top_k) and before < top_p * total)
        if nucleus and weights[token] >= min_p * max(weights):
            kept.add(token)
        before += weights[token]
    count = 400
    options = dict(top_k=top_k, top_p=top_p, min_p=min_p, seed=7)
    drawn = [draw(logits.expand(count, -1), way, **options) for way in (Draw.FEW, Draw.ANY)]
    assert torch.equal(*drawn)
    found = set(drawn[0].tolist())
    assert found <= kept | edge
    assert {token for token in kept - edge if weights[token] > 0.05 * total} <= found


@pytest.mark.parametrize("top_k", [1, 50, CANDIDATES])
def test_few_candidates_of_a_large_vocabulary_give_the_same_draws(top_k: int) -> None:
    logits = torch.randn(20, 3 * CANDIDATES).mul(2).round(decimals=1)  # with ties
    options = dict(top_k=top_k, top_p=0.95, temperature=1.3, seed=3)
    assert torch.equal(draw(logits, Draw.FEW, **options), draw(logits, Draw.ANY, **options))


@given(rows=st.integers(1, 6), seed=st.integers(0, 2**63 - 1), temperature=st.floats(0.1, 5))
@settings(max_examples=30, deadline=None)
def test_a_row_does_not_depend_on_its_company(rows: int, seed: int, temperature: float) -> None:
    logits, options = torch.randn(rows, 50), chances(rows, temperature, 20, 0.9, 0.01, seed)
    for way in (Draw.FEW, Draw.ANY):
        together = choose(logits, way, options)
        for row in range(rows):
            alone = Chances(*(option[row : row + 1] for option in options))
            assert choose(logits[row : row + 1], way, alone) == together[row]


@pytest.mark.parametrize("options", [dict(top_k=7), dict(top_p=0.8), dict(min_p=0.2)])
def test_kept_tokens_are_those_of_transformers(options: dict[str, Any]) -> None:
    warpers = {
        "top_k": transformers.TopKLogitsWarper,
        "top_p": transformers.TopPLogitsWarper,
        "min_p": transformers.MinPLogitsWarper,
    }
    ((name, value),) = options.items()
    logits = torch.randn(1, 60, generator=torch.Generator().manual_seed(4)) * 2
    kept = warpers[name](value)(torch.zeros(1, 1, dtype=torch.int64), logits.clone()).isfinite()[0]
    drawn = torch.cat([draw(logits.expand(2000, -1), temperature=1.0, seed=seed, **options) for seed in range(4)])
    found = torch.zeros(60, dtype=torch.bool).index_fill(0, drawn, True)
    assert not (found & ~kept).any()
    likely = logits.softmax(-1)[0] > 0.01
    assert torch.equal(found & likely, kept & likely)


def test_logits_are_changed_as_transformers_and_openai_do() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(1, 40, generator=generator) * 3
    prompt, output = [3, 4, 5, 5], [4, 7, 7, 7]
    seen = torch.zeros(1, 40, dtype=torch.int32)
    for token in set(prompt):
        seen[0, token] += 1
    for token in output:
        seen[0, token] += 2
    bias, allowed = torch.zeros(1, 40), torch.tensor([[~(1 << 9), -1]], dtype=torch.int32)
    bias[0, 2] = 5.0
    one = torch.ones(1)
    found = adjust(logits, Adjustments(bias, seen, allowed, one * 1.5, one * 0.25, one * 0.5))
    repeated = transformers.RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([prompt + output]), logits + bias)
    for token in range(40):
        count = output.count(token)
        expected = repeated[0, token] - 0.5 * count - 0.25 * (count > 0)
        if token == 9:
            expected = torch.tensor(float("-inf"))
        torch.testing.assert_close(found[0, token], expected)


def test_a_batch_needs_what_any_of_its_requests_does() -> None:
    greedy, few, every = SamplingParams(), SamplingParams(temperature=1, top_k=9), SamplingParams(temperature=1)
    assert needs_of([greedy, few], 100_000).draw == Draw.FEW
    assert needs_of([greedy, few, every], 100_000).draw == Draw.ANY
    assert needs_of([every], CANDIDATES).draw == Draw.FEW
    more = needs_of([SamplingParams(presence_penalty=1), SamplingParams(logprobs=0)], 10)
    assert more.adjusts and more.logprobs and more.serves(needs_of([greedy], 10))
    assert not needs_of([few], 10).serves(more)


def test_log_probabilities_are_those_of_a_softmax() -> None:
    logits = torch.randn(3, 50)
    told = logprobs_of(logits, torch.tensor([4, 0, 49])).read([2, 0, 20])
    whole = logits.log_softmax(-1)
    for row, (token, each) in enumerate(zip([4, 0, 49], told, strict=True)):
        assert each.logprob == pytest.approx(whole[row, token].item(), abs=1e-5)
        values, tokens = whole[row].topk(len(each.top))
        assert [number for number, _ in each.top] == tokens.tolist()
        assert [value for _, value in each.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert [len(each.top) for each in told] == [2, 0, 20]
