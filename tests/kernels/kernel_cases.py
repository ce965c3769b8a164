"""What the kernel tests share: where and in which dtypes they run, how close is close, and random expert layers."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from duomoe.kernels.bf16_packed import pack_bf16
from duomoe.kernels.permute import group_by_expert_reference
from duomoe.kernels.quantised import block_shape, pack_int4, scale_shape

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
# Triton's interpreter multiplies bfloat16 wrongly, so that is tested on a GPU alone.
DTYPES = [torch.float16, torch.float32] + ([torch.bfloat16] if GPU else [])
# Of ‖out − reference‖ / ‖reference‖, where both were computed in float32 and rounded to the dtype.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
each_cpu_dtype = pytest.mark.parametrize(
    "dtype", [torch.float16, torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype).removeprefix("torch.")
)
few = settings(deadline=None, max_examples=8, derandomize=True, suppress_health_check=list(HealthCheck))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normally distributed numbers, on the device."""
    random = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=random, device=DEVICE).mul_(scale).to(dtype)


def on_cpu(*args: Any) -> tuple[Any, ...]:
    """The same arguments for an operator on the CPU, which does not share their memory."""
    return tuple(arg.cpu().clone() if isinstance(arg, Tensor) else arg for arg in args)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Compare by the norm of the difference; NaN never passes."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    difference = norm = 0.0
    for left, right in zip(actual.flatten().split(1 << 26), expected.flatten().split(1 << 26), strict=True):
        difference += float((left.double() - right.double()).square().sum())
        norm += float(right.double().square().sum())
    limit = TOLERANCE[actual.dtype] * norm**0.5 + 1e-12
    assert difference**0.5 <= limit, f"differs by {difference**0.5}, more than {limit}"


Also = tuple[Tensor | None, Tensor | None]  # scales and zero points


@dataclass
class ExpertLayer:
    """One layer's experts in a slot pool, and a pass of tokens routed to them."""

    x: Tensor
    w_gate_up: Tensor
    w_down: Tensor
    slots: Tensor
    experts: Tensor
    weights: Tensor
    gate_up_also: Also = (None, None)
    down_also: Also = (None, None)

    @property
    def pairs(self) -> int:
        return self.experts.numel()

    @property
    def intermediate(self) -> int:
        return self.w_gate_up.shape[1] // 2

    def on_cpu(self) -> "ExpertLayer":
        """The same on the CPU; poolwise views become tensors of their own."""
        fields = vars(self)
        return ExpertLayer(*(on_cpu(*field) if isinstance(field, tuple) else field.cpu() for field in fields.values()))

    def sorted_pairs(self) -> tuple[Tensor, Tensor]:
        return group_by_expert_reference(self.experts, len(self.slots))

    def resident(self) -> Tensor:
        """[pairs] bool: whose expert is in a slot."""
        flat = self.experts.flatten().long()
        return (flat >= 0) & (self.slots[flat.clamp(min=0)] >= 0)

    def waves(self, count: int, seed: int) -> list["ExpertLayer"]:
        """The same pass in several waves: each has some of the experts, in other slots of a pool of its own."""
        wave_of = torch.randint(count, self.slots.shape, generator=generator(seed)).to(DEVICE)
        found = []
        for wave in range(count):
            place = torch.randperm(len(self.w_down), generator=generator(seed + wave + 1)).to(DEVICE)
            moved = place[self.slots.long()].to(torch.int32)
            slots = torch.where((self.slots >= 0) & (wave_of == wave), moved, -1)
            back = place.argsort()
            w_gate_up, w_down = self.w_gate_up[back], self.w_down[back]
            also = [
                tuple(item if item is None else item[back] for item in pair)
                for pair in (self.gate_up_also, self.down_also)
            ]
            found.append(ExpertLayer(self.x, w_gate_up, w_down, slots, self.experts, self.weights, *also))
        return found


def pool_views(slots: int, hidden: int, intermediate: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Empty `w_gate_up` and `w_down`: views into a pool of expert rows, each part 256-byte aligned."""

    def aligned(elements: int) -> int:
        unit = 256 // dtype.itemsize
        return -(-elements // unit) * unit

    down_at = aligned(2 * intermediate * hidden)
    row = down_at + aligned(intermediate * hidden)
    pool = torch.empty(slots * row, dtype=dtype, device=DEVICE)
    gate_up = pool.as_strided((slots, 2 * intermediate, hidden), (row, hidden, 1))
    return gate_up, pool.as_strided((slots, hidden, intermediate), (row, intermediate, 1), down_at)


def expert_layer(
    seed: int,
    dtype: torch.dtype,
    hidden: int,
    intermediate: int,
    num_experts: int,
    top_k: int,
    tokens: int,
    absent: float = 0.0,
    padding: float = 0.0,
) -> ExpertLayer:
    """Draw a layer; `absent` is the share of experts without a slot, `padding` that of pairs without an expert."""
    random = generator(seed)
    w_gate_up, w_down = pool_views(num_experts + 2, hidden, intermediate, dtype)
    w_gate_up.copy_(normal(seed + 1, *w_gate_up.shape, scale=hidden**-0.5))
    w_down.copy_(normal(seed + 2, *w_down.shape, scale=intermediate**-0.5))
    slots = torch.randperm(num_experts + 2, generator=random)[:num_experts].to(torch.int32)
    slots[torch.rand(num_experts, generator=random) < absent] = -1
    experts = torch.rand(tokens, num_experts, generator=random).argsort(-1)[:, :top_k].to(torch.int32)
    experts[torch.rand(experts.shape, generator=random) < padding] = -1
    weights = torch.rand(tokens, top_k, generator=random)
    x = normal(seed + 3, tokens, hidden, dtype=dtype)
    return ExpertLayer(x, w_gate_up, w_down, slots.to(DEVICE), experts.to(DEVICE), weights.to(DEVICE))


def packed(layer: ExpertLayer) -> ExpertLayer:
    """The same pass over the same experts, whose values are bfloat16 in 12 bits."""
    gate_up, down = _packed_pool(layer.w_gate_up, 2), _packed_pool(layer.w_down, 1)
    return replace(layer, w_gate_up=gate_up[0], gate_up_also=gate_up[1:], w_down=down[0], down_also=down[1:])


def _packed_pool(w: Tensor, matrices: int) -> tuple[Tensor, ...]:
    experts = []
    for expert in w.bfloat16().cpu():
        parts = [pack_bf16(matrix.contiguous()) for matrix in expert.chunk(matrices)]
        experts.append([torch.cat(tensors) for tensors in zip(*parts, strict=True)])  # type: ignore[arg-type]
    return tuple(torch.stack(tensors).to(DEVICE) for tensors in zip(*experts, strict=True))


def quantised(layer: ExpertLayer, form: str, seed: int = 0) -> ExpertLayer:
    """The same pass over random experts of another form: 'fp8', 'int4' or 'int4-64', with groups of 64."""
    slots, hidden, intermediate = len(layer.w_down), layer.x.shape[1], layer.intermediate
    gate_up = _quantised_pool(form, seed, slots, 2, intermediate, hidden)
    down = _quantised_pool(form, seed + 9, slots, 1, hidden, intermediate)
    return replace(layer, w_gate_up=gate_up[0], gate_up_also=gate_up[1:], w_down=down[0], down_also=down[1:])


def _quantised_pool(form: str, seed: int, slots: int, matrices: int, outer: int, inner: int) -> tuple[Tensor, ...]:
    """Weights, scales and zero points of stacked matrices; values are about as large as those of plain layers."""
    rows = matrices * outer
    if form == "fp8":
        w = normal(seed, slots, rows, inner, dtype=torch.float8_e4m3fn)
        groups, columns = block_shape(outer, inner)
        return w, _scales(seed, slots, matrices * groups, columns, scale=inner**-0.5), None
    group = 64 if form == "int4-64" else 128
    nibbles = torch.randint(16, (slots * rows, inner), generator=generator(seed), dtype=torch.uint8)
    groups, columns = scale_shape(outer, inner, group)
    zeros = torch.randint(17, (slots, matrices * groups, columns), generator=generator(seed + 1), dtype=torch.uint8)
    scales = _scales(seed, slots, matrices * groups, columns, scale=inner**-0.5 / 5).half()
    return pack_int4(nibbles).view(slots, rows, -1).to(DEVICE), scales, zeros.to(DEVICE)


def _scales(seed: int, *shape: int, scale: float) -> Tensor:
    return (torch.rand(shape, generator=generator(seed)) + 0.5).mul_(scale).to(DEVICE)


def moe_by_hand(layer: ExpertLayer) -> Tensor:
    """The layer's output [pairs, hidden] in float64, one token and choice after the other; 0 where nobody computes."""
    out = torch.zeros(layer.pairs, layer.x.shape[1], dtype=torch.float64)
    top_k = layer.experts.shape[1]
    for pair in range(layer.pairs):
        token, choice = divmod(pair, top_k)
        expert = int(layer.experts[token, choice])
        if expert < 0 or layer.slots[expert] < 0:
            continue
        x = layer.x[token].double().cpu()
        gate_up = layer.w_gate_up[layer.slots[expert]].double().cpu()
        down = layer.w_down[layer.slots[expert]].double().cpu()
        gate, up = gate_up[: layer.intermediate] @ x, gate_up[layer.intermediate :] @ x
        out[pair] = float(layer.weights[token, choice]) * (down @ (gate / (1 + torch.exp(-gate)) * up))
    return out
