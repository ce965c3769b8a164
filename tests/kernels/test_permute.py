import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DEVICE, few, generator
from torch import Tensor

from duomoe.kernels.permute import BLOCK, group_by_expert, group_by_expert_reference, group_by_expert_triton


def draw(seed: int, tokens: int, top_k: int, num_experts: int) -> Tensor:
    """Experts, at most half of which occur, and here and there padding."""
    some = torch.randint(num_experts, (max(num_experts // 2, 1),), generator=generator(seed))
    experts = some[torch.randint(len(some), (tokens, top_k), generator=generator(seed + 1))]
    experts[torch.rand(tokens, top_k, generator=generator(seed + 2)) < 0.1] = -1
    return experts.to(DEVICE, torch.int32)


@few
@given(
    tokens=st.sampled_from([0, 1, 3, BLOCK // 2, 200]),
    top_k=st.integers(1, 8),
    num_experts=st.sampled_from([1, 8, 60, 127, 128]),
    seed=st.integers(0, 99),
)
def test_kernel_matches_the_reference(tokens: int, top_k: int, num_experts: int, seed: int) -> None:
    experts = draw(seed, tokens, top_k, num_experts)
    order, offsets = group_by_expert_triton(experts, num_experts)
    expected_order, expected_offsets = group_by_expert_reference(experts, num_experts)
    assert order.dtype == offsets.dtype == torch.int32
    assert torch.equal(order, expected_order)
    assert torch.equal(offsets, expected_offsets)


def test_reference_is_a_stable_sort() -> None:
    experts = draw(3, 100, 4, 60)
    order, offsets = group_by_expert_reference(experts, 60)
    flat = experts.flatten().tolist()
    expected = sorted(range(400), key=lambda pair: (flat[pair] if flat[pair] >= 0 else 60, pair))
    assert order.tolist() == expected
    assert offsets.tolist() == [sum(0 <= expert < e for expert in flat) for e in range(61)]


def test_op_keeps_its_promises() -> None:
    torch.library.opcheck(group_by_expert.overload, (draw(0, 6, 2, 8), 8))
