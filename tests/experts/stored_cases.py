"""Random matrices as checkpoints store them, each with its values from the format's definition."""

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def packed(numbers: list[list[int]], order: tuple[int, ...]) -> Tensor:
    """Rows of four-bit numbers as int32, eight in one; bits 4 i to 4 i + 3 have the number that `order[i]` says."""
    rows = []
    for row in numbers:
        words = [sum(row[at + place] << 4 * i for i, place in enumerate(order)) for at in range(0, len(row), 8)]
        rows.append([word - (1 << 32) if word >= 1 << 31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


def awq(seed: int, outer: int, inner: int) -> tuple[dict[str, Tensor], Tensor]:
    """A random matrix as AutoAWQ stores it, and its values."""
    q, zero, scale = numbers(seed, outer, inner, 15)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    stored = {"qweight": packed(q.T.tolist(), order), "qzeros": packed(zero.T.tolist(), order)}
    return stored | {"scales": scale.T.contiguous()}, by_hand(q, zero, scale)


def gptq(seed: int, outer: int, inner: int, symmetric: bool = False, less: int = 1) -> tuple[dict[str, Tensor], Tensor]:
    """A random matrix as AutoGPTQ stores it, and its values."""
    q, zero, scale = numbers(seed, outer, inner, 15 + less)
    zero = torch.full_like(zero, 8) if symmetric else zero.clamp(min=less)
    order = (0, 1, 2, 3, 4, 5, 6, 7)
    stored = {"qweight": packed(q.tolist(), order).T.contiguous(), "qzeros": packed((zero - less).T.tolist(), order)}
    group_of = torch.tensor([k // 64 for k in range(inner)], dtype=torch.int32)
    return stored | {"scales": scale.T.contiguous(), "g_idx": group_of}, by_hand(q, zero, scale)


def numbers(seed: int, outer: int, inner: int, largest_zero: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random numbers, zero points and scales of an int4 matrix with groups of 64 inputs."""
    random, groups = generator(seed), -(-inner // 64)
    q = torch.randint(16, (outer, inner), generator=random)
    zero = torch.randint(largest_zero + 1, (outer, groups), generator=random)
    return q, zero, (torch.rand(outer, groups, generator=random) * 0.02).half()


def by_hand(q: Tensor, zero: Tensor, scale: Tensor) -> Tensor:
    """(q - zero) * scale, number by number."""
    rows = zip(q.tolist(), zero.tolist(), scale.tolist(), strict=True)
    return torch.tensor([[(x - z[k // 64]) * s[k // 64] for k, x in enumerate(row)] for row, z, s in rows])


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
