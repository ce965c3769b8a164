from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DEVICE, assert_close, each_cpu_dtype, each_dtype, few, generator, normal, on_cpu
from torch import Tensor

from duomoe.kernels.attention import paged_attention, paged_attention_reference, paged_attention_triton


@dataclass
class Case:
    """The arguments of `paged_attention`, in its order."""

    q: Tensor
    k_pages: Tensor
    v_pages: Tensor
    page_table: Tensor
    query_start: Tensor
    context_len: Tensor
    max_query_len: int
    scale: float
    window: int

    def args(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, float, int]:
        return tuple(vars(self).values())

    def owned(self) -> Tensor:
        """The rows of `q` that belong to a sequence."""
        return self.q[: int(self.query_start[-1])]


def draw(
    seed: int,
    dtype: torch.dtype,
    queries: list[int],
    prefixes: list[int],
    page_size: int = 4,
    kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 32,
    window: int = 0,
    padding: int = 0,
) -> Case:
    """Scatter the keys of some sequences over pages; `padding` rows of `q` belong to none of them."""
    contexts = [query + prefix for query, prefix in zip(queries, prefixes, strict=True)]
    needed = [-(-context // page_size) for context in contexts]
    pages = sum(needed) + 3
    scattered = torch.randperm(pages, generator=generator(seed)).tolist()
    # What is not needed is out of bounds: whoever reads it fails, or poisons the result.
    page_table = torch.full((len(queries), max([*needed, 1]) + 2), -(2**24), dtype=torch.int32)
    for sequence, count in enumerate(needed):
        page_table[sequence, :count] = torch.tensor([scattered.pop() for _ in range(count)], dtype=torch.int32)
    shape = (pages, page_size, kv_heads, head_dim)
    return Case(
        normal(seed, sum(queries) + padding, kv_heads * group, head_dim, dtype=dtype),
        normal(seed + 1, *shape, dtype=dtype),
        normal(seed + 2, *shape, dtype=dtype),
        page_table.to(DEVICE),
        torch.tensor([sum(queries[:i]) for i in range(len(queries) + 1)], dtype=torch.int32, device=DEVICE),
        torch.tensor(contexts, dtype=torch.int32, device=DEVICE),
        max([*queries, 1]),
        head_dim**-0.5,
        window,
    )


def dense(case: Case) -> Tensor:
    """The same by torch's own attention, over each sequence's keys laid out one after the other."""
    found = []
    group = case.q.shape[1] // case.k_pages.shape[2]
    starts = case.query_start.tolist()
    for sequence, context in enumerate(case.context_len.tolist()):
        q = case.q[starts[sequence] : starts[sequence + 1]].double()
        pages = case.page_table[sequence, : -(-context // case.k_pages.shape[1])].long()
        k, v = (kv[pages].flatten(0, 1)[:context].double().transpose(0, 1) for kv in (case.k_pages, case.v_pages))
        distance = torch.arange(context - len(q), context)[:, None] - torch.arange(context)
        mask = (distance >= 0) & (distance < (case.window or context + 1))
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        found.append(
            F.scaled_dot_product_attention(q.transpose(0, 1), k, v, mask.to(DEVICE), scale=case.scale).transpose(0, 1)
        )
    return torch.cat(found).to(case.q.dtype)


heads = st.sampled_from([(1, 1, 32), (2, 3, 48), (1, 8, 64), (2, 1, 80), (1, 20, 32), (2, 4, 96), (1, 4, 128)])
windows = st.sampled_from([0, 1, 7, 130])
page_sizes = st.sampled_from([1, 3, 16])


@each_dtype
@few
@given(
    queries=st.lists(st.sampled_from([0, 1, 2, 17, 70, 150]), min_size=1, max_size=3),
    prefix=st.sampled_from([0, 5, 140]),
    page_size=page_sizes,
    head=heads,
    window=windows,
    seed=st.integers(0, 99),
)
def test_prefill_matches_the_reference(
    dtype: torch.dtype,
    queries: list[int],
    prefix: int,
    page_size: int,
    head: tuple[int, int, int],
    window: int,
    seed: int,
) -> None:
    case = draw(seed, dtype, [*queries, 2], [prefix * i for i in range(len(queries) + 1)], page_size, *head, window, 3)
    out = paged_attention_triton(*case.args())
    rows = len(case.owned())
    assert_close(out[:rows], paged_attention_reference(*case.args())[:rows])


@each_dtype
@few
@given(
    contexts=st.lists(st.sampled_from([0, 1, 5, 128, 129, 300]), min_size=1, max_size=4),
    page_size=page_sizes,
    head=heads,
    window=windows,
    seed=st.integers(0, 99),
)
def test_decode_matches_the_reference(
    dtype: torch.dtype, contexts: list[int], page_size: int, head: tuple[int, int, int], window: int, seed: int
) -> None:
    queries = [min(context, 1) for context in contexts]
    prefixes = [max(context - 1, 0) for context in contexts]
    case = draw(seed, dtype, queries, prefixes, page_size, *head, window, 2)
    out = paged_attention_triton(*case.args())
    rows = len(case.owned())
    assert_close(out[:rows], paged_attention_reference(*case.args())[:rows])


@each_dtype
@pytest.mark.parametrize("window", [0, 8500])
def test_decode_joins_very_many_chunks(dtype: torch.dtype, window: int) -> None:
    case = draw(0, dtype, [1], [9000], 16, 1, 1, 32, window)
    case.k_pages[case.page_table[0, 560].long()] *= 3  # So that the largest score is found late.
    assert_close(paged_attention_triton(*case.args()), paged_attention_reference(*case.args()))


@each_dtype
@few
@given(context=st.sampled_from([1, 60, 200]), page_size=page_sizes, head=heads, window=windows, seed=st.integers(0, 99))
def test_decode_is_the_last_row_of_prefill(
    dtype: torch.dtype, context: int, page_size: int, head: tuple[int, int, int], window: int, seed: int
) -> None:
    case = draw(seed, dtype, [context], [0], page_size, *head, window)
    prefill = paged_attention_triton(*case.args())
    last = replace(case, q=case.q[-1:], query_start=case.query_start.clamp(max=1), max_query_len=1)
    assert_close(paged_attention_triton(*last.args()), prefill[-1:])


@each_dtype
def test_decode_does_not_depend_on_company_or_table_width(dtype: torch.dtype) -> None:
    case = draw(0, dtype, [1, 1, 1], [300, 20, 130])
    out = paged_attention_triton(*case.args())
    unused = torch.full((3, 200), -(2**24), dtype=torch.int32, device=DEVICE)
    wide = replace(case, page_table=torch.cat((case.page_table, unused), 1))
    assert torch.equal(paged_attention_triton(*wide.args()), out)
    alone = replace(
        case,
        q=case.q[:1],
        page_table=case.page_table[:1],
        query_start=case.query_start[:2],
        context_len=case.context_len[:1],
    )
    assert torch.equal(paged_attention_triton(*alone.args()), out[:1])


@each_dtype
def test_a_padding_sequence_without_keys_gives_zeros(dtype: torch.dtype) -> None:
    case = draw(0, dtype, [1, 1], [20, 0])
    case.context_len[1] = 0
    case.page_table[1] = -1
    out = paged_attention_triton(*case.args())
    assert_close(out[:1], paged_attention_reference(*case.args())[:1])
    assert not out[1].any()


def test_no_tokens() -> None:
    case = draw(0, torch.float32, [0, 0], [0, 5])
    assert paged_attention_triton(*case.args()).shape == case.q.shape


@pytest.mark.parametrize("window", [0, 1, 9])
@pytest.mark.parametrize("queries", [[1, 1, 1], [300, 7, 1]])
def test_reference_is_attention(queries: list[int], window: int) -> None:
    case = draw(1, torch.float32, queries, [9, 0, 40], page_size=3, window=window)
    assert_close(paged_attention_reference(*case.args()), dense(case))


@pytest.mark.parametrize("queries", [[1, 1], [5, 2]])
def test_op_keeps_its_promises(queries: list[int]) -> None:
    torch.library.opcheck(paged_attention.overload, draw(0, torch.float32, queries, [3, 9]).args())


@each_cpu_dtype
@pytest.mark.parametrize("window", [0, 1, 9, 130, 1000])
@pytest.mark.parametrize("neighbours", [True, False])
@pytest.mark.parametrize("head", [(2, 3, 48), (1, 1, 32)])
def test_on_a_cpu(dtype: torch.dtype, window: int, neighbours: bool, head: tuple[int, int, int]) -> None:
    for queries, prefixes in (([1, 1, 0, 1], [300, 20, 3, 0]), ([70, 0, 300, 2, 1], [0, 4, 0, 140, 7]), ([290], [33])):
        case = draw(0, dtype, queries, prefixes, 4, *head, window, padding=2)
        args = on_cpu(*case.args())
        if neighbours:
            used = [-(-context // 4) for context in case.context_len.tolist()]
            for sequence, count in enumerate(used):
                args[3][sequence, :count] = torch.arange(count) + sum(used[:sequence])
        out, rows = paged_attention(*args), len(case.owned())
        assert out.shape == case.q.shape and out.is_contiguous()
        assert_close(out[:rows], paged_attention_reference(*args)[:rows])


def test_a_padding_sequence_on_a_cpu_gives_zeros() -> None:
    case = draw(0, torch.float32, [1, 1], [20, 0])
    case.context_len[1] = 0
    assert not paged_attention(*on_cpu(*case.args()))[1].any()


@pytest.mark.gpu
@pytest.mark.parametrize("head", [(8, 4, 128), (4, 8, 128), (16, 1, 128)], ids=["mixtral", "qwen3", "qwen1.5"])
@pytest.mark.parametrize("window", [0, 1000])
def test_real_heads_in_bfloat16(head: tuple[int, int, int], window: int) -> None:
    prompts = draw(0, torch.bfloat16, [2000, 33, 700], [0, 3000, 64], 16, *head, window)
    assert_close(paged_attention_triton(*prompts.args()), paged_attention_reference(*prompts.args()))
    steps = draw(1, torch.bfloat16, [1] * 5, [0, 4095, 127, 128, 9000], 16, *head, window)
    assert_close(paged_attention_triton(*steps.args()), paged_attention_reference(*steps.args()))


@pytest.mark.gpu
def test_pages_beyond_32_bits() -> None:
    case = draw(0, torch.bfloat16, [5, 40], [100, 0], 16, 4, 2, 128)
    far = 2**31 // (16 * 4 * 128) + 10  # The first pages whose elements are numbered beyond 32 bits.
    k_pages, v_pages = (torch.empty(far + 20, 16, 4, 128, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    count = len(case.k_pages)
    k_pages[far : far + count], v_pages[far : far + count] = case.k_pages, case.v_pages
    table = torch.where(case.page_table >= 0, case.page_table + far, -1)
    moved = replace(case, k_pages=k_pages, v_pages=v_pages, page_table=table)
    assert torch.equal(paged_attention_triton(*moved.args()), paged_attention_triton(*case.args()))
