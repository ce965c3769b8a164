"""What the kernels reach: the experts beside cuBLAS and a plain copy, and attention over pages.

On a GPU, calls are captured in a CUDA graph over so many inputs that nothing stays in the L2 cache, and timed with
events; `extra_info` has the microseconds of one call with GB/s or TFLOP/s. On a CPU, the references run small shapes.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from duomoe.experts.compute import expanded_experts
from duomoe.kernels import (
    expand,
    experts_down,
    experts_down_gemv,
    experts_gate_up,
    experts_gate_up_gemv,
    group_by_expert,
    paged_attention,
    quantise_activations,
)
from duomoe.kernels.bf16_packed import pack_bf16
from duomoe.kernels.expert_gemv import gemv_splits
from duomoe.kernels.quantised import block_shape, packed_width, scale_shape

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32
gpu = pytest.mark.gpu


@dataclass(frozen=True)
class Shape:
    hidden: int
    intermediate: int
    num_experts: int
    top_k: int


SMALL = Shape(256, 128, 8, 2)
MIXTRAL = Shape(4096, 14336, 8, 2)
QWEN3 = Shape(2048, 768, 128, 8)


def measure(
    benchmark: BenchmarkFixture, calls: list[Callable[[], object]], *, gigabytes: float = 0.0, teraflop: float = 0.0
) -> None:
    """Time some calls that each move `gigabytes` or compute `teraflop`."""
    if not GPU:
        benchmark.pedantic(lambda: [call() for call in calls])
        return
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    seconds = []

    def replay() -> None:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1000 / len(calls))

    benchmark.pedantic(replay, rounds=20, warmup_rounds=3)
    median = statistics.median(seconds)
    benchmark.extra_info["µs"] = round(median * 1e6, 1)
    if gigabytes:
        benchmark.extra_info["GB/s"] = round(gigabytes / median)
    if teraflop:
        benchmark.extra_info["TFLOP/s"] = round(teraflop / median)


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.empty(shape, dtype=DTYPE, device=DEVICE).normal_(0.0, scale)


Pool = tuple[Tensor, Tensor | None, Tensor | None]  # weights, scales, zero points

forms = pytest.mark.parametrize("form", ["plain", "packed", "fp8", "int4"])
# Those that are `expanded` become plain before they are multiplied, as many at a time as the runtime has room for.
gemm_forms = pytest.mark.parametrize(
    "form", ["plain", "packed expanded", "fp8", "fp8 expanded", "w8a8", "int4", "int4 expanded"]
)


def matrices(shape: Shape, form: str) -> tuple[Pool, Pool, Tensor]:
    """The layer's `gate_up` and `down`, and slots that are the experts themselves."""
    return (
        pool(form, shape.num_experts, 2, shape.intermediate, shape.hidden),
        pool(form, shape.num_experts, 1, shape.hidden, shape.intermediate),
        torch.arange(shape.num_experts, dtype=torch.int32, device=DEVICE),
    )


def pool(form: str, slots: int, stacked: int, outer: int, inner: int) -> Pool:
    """Random weights of a form; matrices of the same size are stacked."""
    rows, form = stacked * outer, form.removesuffix(" expanded")
    if form == "packed":
        # The same experts again and again: packing takes the host longer than all that is measured.
        experts = []
        for _ in range(2):
            parts = [pack_bf16(random(outer, inner, scale=inner**-0.5).cpu().bfloat16()) for _ in range(stacked)]
            experts.append([torch.cat(tensors) for tensors in zip(*parts, strict=True)])
        w, bases, patches = (torch.stack(tensors).to(DEVICE) for tensors in zip(*experts, strict=True))
        again = torch.arange(slots, device=DEVICE) % 2
        return w[again], bases[again], patches[again]
    if form == "plain":
        return random(slots, rows, inner, scale=inner**-0.5), None, None
    if form in ("fp8", "w8a8"):
        groups, columns = block_shape(outer, inner)
        w = random(slots, rows, inner).to(torch.float8_e4m3fn)
        return w, torch.full((slots, stacked * groups, columns), inner**-0.5, device=DEVICE), None
    groups, columns = scale_shape(outer, inner, 128)
    scales = torch.full((slots, stacked * groups, columns), inner**-0.5 / 5, dtype=torch.float16, device=DEVICE)
    w = torch.randint(256, (slots, rows, packed_width(inner)), dtype=torch.uint8, device=DEVICE)
    return w, scales, torch.full_like(scales, 8, dtype=torch.uint8)


def expert_gigabytes(of: Pool) -> float:
    """What one expert's part of a pool takes."""
    return sum(item[0].nbytes for item in of if item is not None) / 1e9


decode_shapes = pytest.mark.parametrize(
    "shape",
    [
        pytest.param(SMALL, id="small"),
        pytest.param(MIXTRAL, id="mixtral", marks=gpu),
        pytest.param(QWEN3, id="qwen3", marks=gpu),
    ],
)
prefill_shapes = pytest.mark.parametrize(
    ("shape", "tokens"),
    [
        pytest.param(SMALL, 64, id="small"),
        pytest.param(MIXTRAL, 512, id="mixtral-512", marks=gpu),
        pytest.param(MIXTRAL, 8192, id="mixtral-8192", marks=gpu),
        pytest.param(QWEN3, 512, id="qwen3-512", marks=gpu),
        pytest.param(QWEN3, 8192, id="qwen3-8192", marks=gpu),
    ],
)


@gpu
@pytest.mark.parametrize("mb", [6, 12, 25, 60, 120, 2000])
def test_copy(benchmark: BenchmarkFixture, mb: int) -> None:
    """The bandwidth that a decode GEMV is measured against, bytes read plus bytes written; also of as few as it has."""
    count = max(1, 600 // mb)
    source = torch.empty(count, mb * 500_000, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    calls = [lambda n=number: target[n].copy_(source[n]) for number in range(count)]
    measure(benchmark, calls, gigabytes=mb / 1e3)


def one_token(shape: Shape) -> list[Tensor]:
    """One token's experts, again and again until every expert had its turn."""
    every = torch.arange(shape.num_experts, dtype=torch.int32, device=DEVICE)
    return list(every.view(-1, 1, shape.top_k))


@forms
@decode_shapes
def test_gate_up_gemv(benchmark: BenchmarkFixture, shape: Shape, form: str) -> None:
    gate_up, _, slots = matrices(shape, form)
    x = random(1, shape.hidden)
    splits = gemv_splits(shape.hidden, 2 * shape.intermediate, shape.top_k, form in ("fp8", "int4"))
    out = torch.empty(splits, shape.top_k, 2 * shape.intermediate, device=DEVICE)
    w, *also = gate_up
    calls = [lambda e=experts: experts_gate_up_gemv(x, w, slots, e, out, *also) for experts in one_token(shape)]
    measure(benchmark, calls, gigabytes=shape.top_k * expert_gigabytes(gate_up))


@forms
@decode_shapes
def test_down_gemv(benchmark: BenchmarkFixture, shape: Shape, form: str) -> None:
    _, down, slots = matrices(shape, form)
    partial = gemv_splits(shape.hidden, 2 * shape.intermediate, shape.top_k, form in ("fp8", "int4"))
    gate_up = random(partial, shape.top_k, 2 * shape.intermediate).float()
    splits = gemv_splits(shape.intermediate, shape.hidden, shape.top_k, form in ("fp8", "int4"))
    out = torch.empty(splits, shape.top_k, shape.hidden, device=DEVICE)
    weights = torch.rand(1, shape.top_k, device=DEVICE)
    w, *also = down
    calls = [
        lambda e=experts: experts_down_gemv(gate_up, w, slots, e, weights, out, *also) for experts in one_token(shape)
    ]
    measure(benchmark, calls, gigabytes=shape.top_k * expert_gigabytes(down))


def sorted_pass(shape: Shape, tokens: int) -> tuple[Tensor, Tensor]:
    chosen = torch.rand(tokens, shape.num_experts, device=DEVICE).argsort(-1)[:, : shape.top_k].to(torch.int32)
    return group_by_expert(chosen, shape.num_experts)


def inputs(x: Tensor, form: str) -> tuple[Tensor, Tensor | None]:
    """Activations as a form takes them; to quantise them is part of the work."""
    return quantise_activations(x) if form == "w8a8" else (x, None)


def multiply(
    shape: Shape, form: str, stacked: int, of: Pool, slots: Tensor, product: Callable[[Tensor, Tensor, list[Any]], None]
) -> Callable[[], None]:
    """A call of a product with weights, slots and what goes with the weights; plain ones where it expands them."""
    w, *also = of
    if not form.endswith(" expanded"):
        return lambda: product(w, slots, also)
    outer, inner = (2 * shape.intermediate, shape.hidden) if stacked == 2 else (shape.hidden, shape.intermediate)
    count = expanded_experts(shape.hidden, shape.intermediate, shape.num_experts, DTYPE)
    plain, places = torch.empty(count, outer, inner, dtype=DTYPE, device=DEVICE), torch.empty_like(slots)

    def call() -> None:
        for first in range(0, shape.num_experts, count):
            expand(w, *also, stacked, slots, first, plain, places)
            product(plain, places, [None, None])

    return call


@pytest.mark.parametrize("form", ["packed", "fp8", "int4"])
@decode_shapes
def test_expand(benchmark: BenchmarkFixture, shape: Shape, form: str) -> None:
    """Writing experts out plain, as many as the runtime does at a time; bytes read plus bytes written."""
    (w, *also), _, slots = matrices(shape, form)
    count = expanded_experts(shape.hidden, shape.intermediate, shape.num_experts, DTYPE)
    out = torch.empty(count, 2 * shape.intermediate, shape.hidden, dtype=DTYPE, device=DEVICE)
    places = torch.empty_like(slots)
    calls = [
        lambda first=first: expand(w, *also, 2, slots, first, out, places)
        for first in range(0, shape.num_experts - count + 1, count)
    ]
    measure(benchmark, calls, gigabytes=count * (expert_gigabytes((w, *also)) + out[0].nbytes / 1e9))


@gemm_forms
@prefill_shapes
def test_gate_up_gemm(benchmark: BenchmarkFixture, shape: Shape, tokens: int, form: str) -> None:
    gate_up, _, slots = matrices(shape, form)
    x, (order, offsets) = random(tokens, shape.hidden), sorted_pass(shape, tokens)
    h = torch.empty(len(order), shape.intermediate, dtype=DTYPE, device=DEVICE)
    teraflop = 4 * len(order) * shape.hidden * shape.intermediate / 1e12

    def product(w: Tensor, slots: Tensor, also: list[Any]) -> None:
        fed, fed_scales = inputs(x, form)
        experts_gate_up(fed, w, slots, order, offsets, shape.top_k, h, *also, fed_scales)

    call = multiply(shape, form, 2, gate_up, slots, product)
    measure(benchmark, [call], teraflop=teraflop, gigabytes=shape.num_experts * expert_gigabytes(gate_up))


@gemm_forms
@prefill_shapes
def test_down_gemm(benchmark: BenchmarkFixture, shape: Shape, tokens: int, form: str) -> None:
    _, down, slots = matrices(shape, form)
    order, offsets = sorted_pass(shape, tokens)
    h, weights = random(len(order), shape.intermediate), torch.rand(tokens, shape.top_k, device=DEVICE)
    out = torch.empty(len(order), shape.hidden, dtype=DTYPE, device=DEVICE)
    teraflop = 2 * len(order) * shape.hidden * shape.intermediate / 1e12

    def product(w: Tensor, slots: Tensor, also: list[Any]) -> None:
        fed, fed_scales = inputs(h, form)
        experts_down(fed, w, slots, order, offsets, weights, out, *also, fed_scales)

    call = multiply(shape, form, 1, down, slots, product)
    measure(benchmark, [call], teraflop=teraflop, gigabytes=shape.num_experts * expert_gigabytes(down))


@pytest.mark.parametrize("name", ["gate_up", "down"])
@prefill_shapes
def test_dense_matmul(benchmark: BenchmarkFixture, shape: Shape, tokens: int, name: str) -> None:
    """As many multiplications as the experts have, in one dense product (cuBLAS on a GPU)."""
    pairs, outer, inner = tokens * shape.top_k, 2 * shape.intermediate, shape.hidden
    if name == "down":
        outer, inner = shape.hidden, shape.intermediate
    x, w = random(pairs, inner), random(outer, inner)
    out = torch.empty(pairs, outer, dtype=DTYPE, device=DEVICE)
    teraflop = 2 * pairs * outer * inner / 1e12
    measure(benchmark, [lambda: torch.mm(x, w.T, out=out)], teraflop=teraflop)


@pytest.mark.parametrize(
    ("sequences", "context"),
    [
        pytest.param(2, 300, id="small"),
        pytest.param(1, 4096, id="1x4096", marks=gpu),
        pytest.param(1, 32768, id="1x32768", marks=gpu),
        pytest.param(16, 8192, id="16x8192", marks=gpu),
    ],
)
def test_paged_decode(benchmark: BenchmarkFixture, sequences: int, context: int) -> None:
    """Qwen3-30B-A3B's heads; eight layers' pages, so that they do not fit into the L2 cache."""
    page_size, q_heads, kv_heads, head_dim = 16, 32, 4, 128
    pages = -(-context // page_size)
    layers = [random(2, sequences * pages, page_size, kv_heads, head_dim) for _ in range(8 if GPU else 1)]
    table = torch.randperm(sequences * pages, device=DEVICE).view(sequences, pages).to(torch.int32)
    q = random(sequences, q_heads, head_dim)
    query_start = torch.arange(sequences + 1, dtype=torch.int32, device=DEVICE)
    contexts = torch.full((sequences,), context, dtype=torch.int32, device=DEVICE)
    calls = [
        lambda kv=kv: paged_attention(q, kv[0], kv[1], table, query_start, contexts, 1, head_dim**-0.5, 0)
        for kv in layers
    ]
    measure(benchmark, calls, gigabytes=layers[0].nbytes / 1e9)
