import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import assert_close, each_dtype, few, normal

from duomoe.kernels.router import route, route_reference, route_triton

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NaN in numpy.


@each_dtype
@few
@given(
    tokens=st.sampled_from([0, 1, 5, 70]),
    shape=st.sampled_from([(4, 1), (4, 4), (8, 2), (60, 4), (128, 8), (130, 10)]),
    renormalize=st.booleans(),
    seed=st.integers(0, 99),
)
def test_kernel_matches_the_reference(
    dtype: torch.dtype, tokens: int, shape: tuple[int, int], renormalize: bool, seed: int
) -> None:
    num_experts, top_k = shape
    # Few distinct values, so that there are ties.
    logits = (normal(seed, tokens, num_experts) * 4).round().div(2).to(dtype)
    weights, experts = route_triton(logits, top_k, renormalize)
    expected_weights, expected_experts = route_reference(logits, top_k, renormalize)
    assert torch.equal(experts, expected_experts)
    assert_close(weights, expected_weights)


@each_dtype
def test_nan_rows_can_be_computed_on(dtype: torch.dtype) -> None:
    logits = normal(0, 4, 60, dtype=dtype)
    logits[1] = float("nan")
    logits[2, 7] = float("nan")
    for compute in (route_triton, route_reference):
        weights, experts = compute(logits, 4, True)
        assert experts.min() >= 0
        assert experts.max() < 60
        assert all(len(set(row)) == 4 for row in experts.tolist())
        assert weights.isnan().any(1).tolist() == [False, True, True, False]


def test_minus_infinity_is_never_taken_first() -> None:
    logits = torch.full((1, 8), float("-inf"), device=normal(0, 1).device)
    logits[0, 5] = 1.0
    weights, experts = route_triton(logits, 3, True)
    assert experts.tolist() == [[5, 0, 1]]
    assert weights.tolist() == [[1.0, 0.0, 0.0]]


@each_dtype
def test_logits_may_be_strided(dtype: torch.dtype) -> None:
    logits = normal(0, 5, 100, dtype=dtype)[:, :60]
    assert torch.equal(route_triton(logits, 4, False)[1], route_reference(logits, 4, False)[1])


def test_reference_is_topk_of_softmax() -> None:
    logits = normal(0, 50, 60)
    weights, experts = logits.softmax(-1).topk(4)
    assert_close(route_reference(logits, 4, False)[0], weights)
    assert_close(route_reference(logits, 4, True)[0], weights / weights.sum(-1, keepdim=True))
    assert torch.equal(route_reference(logits, 4, False)[1].long(), experts)


@pytest.mark.parametrize("renormalize", [False, True])
def test_op_keeps_its_promises(renormalize: bool) -> None:
    torch.library.opcheck(route.overload, (normal(0, 5, 8), 2, renormalize))
