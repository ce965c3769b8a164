"""Random matrices as checkpoints store them, each with its values from the format's definition."""

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from torch import Tensor


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def packed(numbers: list[list[int]], order: tuple[int, ...]) -> Tensor:
    """Rows of small numbers as int32, `len(order)` in one; the lowest bits have the number that `order[0]` says."""
    rows, count, bits = [], len(order), 32 // len(order)
    for row in numbers:
        row = [*row, *[0] * (-len(row) % count)]
        words = [sum(row[at + place] << bits * i for i, place in enumerate(order)) for at in range(0, len(row), count)]
        rows.append([word - (1 << 32) if word >= 1 << 31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


def awq(seed: int, outer: int, inner: int) -> tuple[dict[str, Tensor], Tensor]:
    """A random matrix as AutoAWQ stores it, and its values."""
    q, zero, scale = numbers(seed, outer, inner, 15)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    stored = {"qweight": packed(q.T.tolist(), order), "qzeros": packed(zero.T.tolist(), order)}
    return stored | {"scales": scale.T.contiguous()}, by_hand(q, zero, scale)


def gptq(
    seed: int,
    outer: int,
    inner: int,
    symmetric: bool = False,
    less: int = 1,
    group: int = 64,
    bits: int = 4,
    scale_dtype: torch.dtype = torch.float16,
) -> tuple[dict[str, Tensor], Tensor]:
    """A random matrix as AutoGPTQ stores it, and its values."""
    q, zero, scale = numbers(seed, outer, inner, 2**bits - 1 + less, group, bits)
    scale = (scale.float() * 1.0001).to(scale_dtype)
    zero = torch.full_like(zero, 2 ** (bits - 1)) if symmetric else zero.clamp(min=less)
    order = tuple(range(32 // bits))
    stored = {"qweight": packed(q.tolist(), order).T.contiguous(), "qzeros": packed((zero - less).T.tolist(), order)}
    group_of = torch.tensor([k // (group or inner) for k in range(inner)], dtype=torch.int32)
    return stored | {"scales": scale.T.contiguous(), "g_idx": group_of}, by_hand(q, zero, scale, group)


def pack_quantized(
    seed: int, outer: int, inner: int, symmetric: bool = True, group: int = 64, bits: int = 4
) -> tuple[dict[str, Tensor], Tensor]:
    """A random matrix as compressed-tensors stores it, by its own packing, and its values."""
    q, zero, scale = numbers(seed, outer, inner, 2**bits - 1, group, bits)
    middle, scale = 2 ** (bits - 1), scale.bfloat16()
    stored = {
        "weight_packed": pack_to_int32((q - middle).to(torch.int8), bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor([outer, inner]),
    }
    if symmetric:
        return stored, by_hand(q, torch.full_like(zero, middle), scale, group)
    stored["weight_zero_point"] = pack_to_int32((zero - middle).to(torch.int8), bits, packed_dim=0).contiguous()
    return stored, by_hand(q, zero, scale, group)


def numbers(
    seed: int, outer: int, inner: int, largest_zero: int, group: int = 64, bits: int = 4
) -> tuple[Tensor, Tensor, Tensor]:
    """Random numbers, zero points and scales of a matrix of integers; a group of 0 is all inputs."""
    random, groups = generator(seed), -(-inner // (group or inner))
    q = torch.randint(2**bits, (outer, inner), generator=random)
    zero = torch.randint(largest_zero + 1, (outer, groups), generator=random)
    return q, zero, (torch.rand(outer, groups, generator=random) * 0.32 / 2**bits).half()


def by_hand(q: Tensor, zero: Tensor, scale: Tensor, group: int = 64) -> Tensor:
    """(q - zero) * scale, number by number."""
    rows, group = zip(q.tolist(), zero.tolist(), scale.tolist(), strict=True), group or q.shape[1]
    values = [[(x - z[k // group]) * s[k // group] for k, x in enumerate(row)] for row, z, s in rows]
    return torch.tensor(values)


def scaled(
    seed: int,
    outer: int,
    inner: int,
    block: tuple[int, int] | None = None,
    scale_shape: str = "block",
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale_dtype: torch.dtype = torch.float32,
    name: str = "weight_scale",
) -> tuple[dict[str, Tensor], Tensor]:
    """A random matrix of 8 bits a value, of which a block (outputs, inputs), or all where it is None, has a scale."""
    random = generator(seed)
    tall, wide = block or (outer, inner)
    bits = torch.randint(256, (outer, inner), generator=random, dtype=torch.uint8)
    weight = bits.view(torch.int8)
    if dtype != torch.int8:
        weight = torch.where(bits & 127 == 127, 0, bits).view(dtype)
    scale = (torch.rand(-(-outer // tall), -(-inner // (wide or inner)), generator=random) * 0.003 + 1e-3).to(
        scale_dtype
    )
    found = torch.tensor(
        [
            [w * scale[i // tall, k // (wide or inner)].item() for k, w in enumerate(row)]
            for i, row in enumerate(weight.float().tolist())
        ]
    )
    shapes = {"block": scale.shape, "scalar": (), "one": (1,), "flat": (outer,)}
    return {"weight": weight, name: scale.view(shapes[scale_shape])}, found


def fp8(seed: int, outer: int, inner: int, scale_dtype: torch.dtype = torch.bfloat16) -> tuple[dict[str, Tensor], Any]:
    """A random matrix of every finite fp8 value as DeepSeek stores it, and its values."""
    random = generator(seed)
    bits = torch.randint(256, (outer, inner), generator=random, dtype=torch.uint8)
    weight = torch.where(bits & 127 == 127, 0, bits).view(torch.float8_e4m3fn)
    scale = (torch.rand(-(-outer // 128), -(-inner // 128), generator=random) * 0.01).to(scale_dtype)
    found = torch.empty(outer, inner)
    for i, k in product(range(scale.shape[0]), range(scale.shape[1])):
        block = slice(128 * i, 128 * (i + 1)), slice(128 * k, 128 * (k + 1))
        found[block] = weight[block].float() * scale[i, k].float()
    return {"weight": weight, "weight_scale_inv": scale}, found


def plain(seed: int, outer: int, inner: int) -> tuple[dict[str, Tensor], Tensor]:
    """A random matrix as it is."""
    weight = torch.randn(outer, inner, generator=generator(seed)).bfloat16()
    return {"weight": weight}, weight.float()


Stored = Callable[[int, int, int], tuple[dict[str, Tensor], Tensor]]
