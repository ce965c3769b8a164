"""How checkpoints lay out a matrix [outer, inner]: which tensors it is stored in, and what they are worth.

A matrix that a family's sources call `X.weight` is, by layout,

- plain: `X.weight`, of floats;
- scaled: `X.weight`, F8_E4M3 or I8, times `X.weight_scale_inv` (DeepSeek's name) or `X.weight_scale`: one number,
  one for each output, or one for each block [outer blocks, inner blocks];
- awq (AutoAWQ's GEMM layout): `X.qweight` I32 [in, out / 8], `X.qzeros` I32 [groups, out / 8] and `X.scales`
  [groups, out]; an integer holds outputs 0, 2, 4, 6, 1, 3, 5, 7 of eight, from its lowest four bits up;
- gptq (AutoGPTQ's layout): `X.qweight` I32 [in / 8, out], eight inputs in an integer (four of 8 bits), `X.qzeros` and
  `X.scales` as before, but outputs in order, and `X.g_idx`, each input's group. Zero points are stored less one,
  unless the checkpoint's format is gptq_v2;
- packed (compressed-tensors): `X.weight_packed` I32 [out, in / 8], `X.weight_scale` [out, groups], and unless they lie
  in the middle, `X.weight_zero_point` I32 [out / 8, groups].

Layers that a checkpoint does not quantise have a plain `X.weight`: what is there decides, not the config's list.

What a row can hold as it is stays so (`Layout.form`): fp8 whose scales are those of whole blocks of 128 by 128, and 4
bits in groups of whole 64 inputs, in order. All else becomes its values.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from duomoe.checkpoint import STORED_DTYPES, StoredTensor
from duomoe.errors import InputError
from duomoe.experts.matrix import Fp8Matrix, Int4Matrix, Matrix, PlainMatrix, Require
from duomoe.kernels.quantised import FP8_BLOCK, INT4_GROUPS
from duomoe.models.quantization import Quantization

FLOATS = tuple(STORED_DTYPES)
SCALES = (*FLOATS, "F8_E8M0")

# Which of eight outputs each four bits of an AWQ integer hold.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

Shape = tuple[int, ...]
Expected = tuple[Shape, tuple[str, ...]]  # a stored tensor's shape, and the dtypes that are read


class Form(NamedTuple):
    """What a matrix may be in a row without losing anything; scales and groups are told apart for 'int4' only."""

    name: str  # 'plain', 'fp8' or 'int4'
    scale_dtype: torch.dtype = torch.float32
    group: int = 0


PLAIN = Form("plain")


@dataclass(frozen=True)
class Layout(ABC):
    """How one matrix is stored.

    Attributes:
        name: of the parameter, X.weight.
        shape: of it.
        parts: its tensors' shapes and types, by name, in the order that `matrix` takes.
        form: what it may be in a row.
    """

    name: str
    shape: Shape
    parts: Mapping[str, Expected]
    form: Form

    @abstractmethod
    def matrix(self, parts: list[Tensor], require: Require) -> Matrix:
        """Return the matrix that is stored in `parts`, on their device.

        Args:
            parts: in the order of `self.parts`.
            require: is asked what must hold of them, else InputError.
        """


class PlainLayout(Layout):
    """A parameter of floats, of any shape."""

    def matrix(self, parts: list[Tensor], require: Require) -> Matrix:
        """See `Layout.matrix`."""
        return PlainMatrix(parts[0])


@dataclass(frozen=True)
class ScaledLayout(Layout):
    """Numbers of 8 bits, of which blocks of `block` (outputs, inputs) share a scale."""

    block: tuple[int, int]

    def matrix(self, parts: list[Tensor], require: Require) -> Matrix:
        """See `Layout.matrix`."""
        weight, (outer, inner) = parts[0], self.shape
        tall, wide = self.block
        scales = parts[1].float().view(-(-outer // tall), -(-inner // wide))
        if self.form.name == "fp8":
            blocks = -(-outer // FP8_BLOCK), -(-inner // FP8_BLOCK)
            return Fp8Matrix(weight, _spread(scales, tall // FP8_BLOCK, wide // FP8_BLOCK, *blocks).contiguous())
        return PlainMatrix(weight.float() * _spread(scales, tall, wide, outer, inner))


@dataclass(frozen=True)
class IntegerLayout(Layout):
    """Integers, of which each output's `group` inputs share a scale and a zero point."""

    quantization: Quantization
    group: int

    def matrix(self, parts: list[Tensor], require: Require) -> Matrix:
        """See `Layout.matrix`."""
        (outer, inner), group = self.shape, self.group
        numbers, scales, zeros, group_of = self.unpacked(parts)
        if group_of is not None and self.quantization.reorders and self.form == PLAIN:
            groups = scales.shape[1]
            unknown = InputError(f"{self.name} has inputs in groups that there are not (g_idx)")
            require(((group_of >= 0) & (group_of < groups)).all(), unknown)
            own = group_of.clamp(0, groups - 1)
            return PlainMatrix((numbers.float() - zeros.float()[:, own]) * scales.float()[:, own])
        if group_of is not None:
            in_order = (group_of == torch.arange(inner, device=group_of.device) // group).all()
            problem = InputError(
                f"{self.name} is quantised in another order, though config.json says nothing of desc_act"
            )
            require(in_order, problem)
        if self.form.name == "int4":
            each = self.form.group
            groups = -(-inner // each)
            scales, zeros = (_spread(item, 1, group // each, outer, groups) for item in (scales, zeros))
            return Int4Matrix(numbers, scales, zeros, each)
        scales, zeros = (_spread(item.float(), 1, group, outer, inner) for item in (scales, zeros))
        return PlainMatrix((numbers.float() - zeros) * scales)

    @abstractmethod
    def unpacked(self, parts: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return integers uint8 [outer, inner], scales and zero points [outer, groups], and each input's group."""

    def middle(self, scales: Tensor) -> Tensor:
        """Return the zero points of a matrix that stores none."""
        return torch.full_like(scales, 2 ** (self.quantization.bits - 1), dtype=torch.uint8)


class AwqLayout(IntegerLayout):
    """AutoAWQ's GEMM layout; without `qzeros`, zero points lie in the middle."""

    def unpacked(self, parts: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """See `IntegerLayout.unpacked`."""
        scales = parts[1].T
        zeros = _unpack(parts[2], 4, AWQ_ORDER).T if len(parts) > 2 else self.middle(scales)
        return _unpack(parts[0], 4, AWQ_ORDER).T, scales, zeros, None


class GptqLayout(IntegerLayout):
    """AutoGPTQ's layout, in either version."""

    def matrix(self, parts: list[Tensor], require: Require) -> Matrix:
        """See `Layout.matrix`; what is symmetric must be so by the version that config.json states."""
        if self.quantization.symmetric is not False:
            # Where every zero point is one off the middle, it is the version that is wrong.
            first = self.quantization.zero_offset == 1
            middle = 2 ** (self.quantization.bits - 1)
            off = (_unpack(parts[2], self.quantization.bits) == (middle if first else middle - 1)).all()
            problem = InputError(
                f"the zero points of {self.name} are those of format {'gptq_v2' if first else 'gptq'}, but the config "
                f'says {"gptq" if first else "gptq_v2"}; correct "checkpoint_format" in its quantization_config'
            )
            require(~off, problem)
        return super().matrix(parts, require)

    def unpacked(self, parts: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """See `IntegerLayout.unpacked`."""
        bits = self.quantization.bits
        zeros = _unpack(parts[2], bits).T
        # A zero point of 256 does not fit 8 bits.
        zeros = (zeros if bits == 4 else zeros.float()) + self.quantization.zero_offset
        return _unpack(parts[0].T, bits), parts[1].T, zeros, parts[3] if len(parts) > 3 else None


class PackedLayout(IntegerLayout):
    """compressed-tensors' layout, in which integers are stored with the middle added."""

    def unpacked(self, parts: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """See `IntegerLayout.unpacked`."""
        (outer, inner), bits = self.shape, self.quantization.bits
        zeros = _unpack(parts[2].T, bits).T[:outer] if len(parts) > 2 else self.middle(parts[1])
        return _unpack(parts[0], bits)[:, :inner], parts[1], zeros, None


def _unpack(packed: Tensor, bits: int, order: Sequence[int] | None = None) -> Tensor:
    """Return the numbers in int32 [rows, columns] as uint8 [rows, columns * 32 / bits]; `order` is that of one's."""
    count = 32 // bits
    found = torch.empty(*packed.shape, count, dtype=torch.uint8, device=packed.device)
    for position, place in enumerate(order or range(count)):
        found[..., place] = packed >> (bits * position) & (2**bits - 1)
    return found.flatten(1)


def _spread(values: Tensor, tall: int, wide: int, outer: int, inner: int) -> Tensor:
    """Return a matrix [outer, inner] in which each value stands `tall` times below and `wide` times beside itself."""
    if tall > 1:
        values = values.repeat_interleave(min(tall, outer), 0)
    if wide > 1:
        values = values.repeat_interleave(min(wide, inner), 1)
    return values[:outer, :inner]


def layout_of(
    name: str,
    shape: Shape,
    quantization: Quantization | None,
    found: Mapping[str, StoredTensor],
    in_order: Callable[[str, int], bool],
) -> Layout:
    """Return how a parameter is stored, or should be where its tensors are not there.

    Args:
        name: of the parameter.
        shape: of it.
        quantization: of the checkpoint.
        found: the checkpoint's tensors.
        in_order: is asked of a tensor's name and a size of groups whether each group's inputs are adjacent.

    Raises:
        InputError: when its shape cannot be stored so.
    """
    plain = PlainLayout(name, shape, {name: (shape, FLOATS)}, PLAIN)
    if quantization is None or len(shape) != 2 or (name in found and found[name].dtype in FLOATS):
        return plain
    if quantization.layout == "scaled":
        return _scaled(name, shape, quantization, found)
    if name in found:
        return plain
    layout = _integer(name, shape, quantization, found)
    order = f"{name.removesuffix('weight')}g_idx"
    if quantization.reorders and layout.form != PLAIN and order in found and not in_order(order, layout.group):
        return replace(layout, form=PLAIN)
    return layout


def _scaled(name: str, shape: Shape, quantization: Quantization, found: Mapping[str, StoredTensor]) -> Layout:
    outer, inner = shape
    suffixes = ("weight_scale_inv", "weight_scale")
    names = [name.removesuffix("weight") + suffix for suffix in suffixes]
    scale = next((each for each in names if each in found), names[0])
    block = quantization.block or (outer, inner)
    block = block[0], block[1] or inner
    expected: Shape = -(-outer // block[0]), -(-inner // block[1])
    if scale in found:
        stored = found[scale].shape
        if stored in ((), (1,)):
            block, expected = (outer, inner), stored
        elif stored in ((outer,), (outer, 1)) and stored != expected:
            block, expected = (1, inner), stored
    whole = all(size % FP8_BLOCK == 0 or size >= total for size, total in zip(block, shape, strict=True))
    if whole:  # in whole blocks of 128, of which the last may be shorter
        block = _whole_blocks(block[0]), _whole_blocks(block[1])
    parts = {name: (shape, (quantization.dtype,)), scale: (expected, SCALES)}
    form = Form("fp8") if whole and quantization.dtype == "F8_E4M3" else PLAIN
    return ScaledLayout(name, shape, parts, form, block)


def _whole_blocks(size: int) -> int:
    return -(-size // FP8_BLOCK) * FP8_BLOCK


def _integer(name: str, shape: Shape, quantization: Quantization, found: Mapping[str, StoredTensor]) -> IntegerLayout:
    outer, inner = shape
    prefix, bits = name.removesuffix("weight"), quantization.bits
    assert quantization.block is not None, "integers have a scale for each output"
    group = quantization.block[1] or -(-inner // 128) * 128
    groups, count = -(-inner // group), 32 // bits
    if quantization.layout != "packed" and (outer % count or (inner % count and quantization.layout == "gptq")):
        raise InputError(f"{prefix}qweight cannot hold shape {list(shape)}, {count} by {count}")
    parts: dict[str, Expected]
    match quantization.layout:
        case "awq":
            kind: type[IntegerLayout] = AwqLayout
            parts = {"qweight": ((inner, outer // 8), ("I32",)), "scales": ((groups, outer), FLOATS)}
            if not quantization.symmetric or f"{prefix}qzeros" in found:
                parts["qzeros"] = ((groups, outer // 8), ("I32",))
        case "gptq":
            kind = GptqLayout
            parts = {"qweight": ((inner // count, outer), ("I32",)), "scales": ((groups, outer), FLOATS)}
            parts["qzeros"] = ((groups, outer // count), ("I32",))
            if f"{prefix}g_idx" in found:
                parts["g_idx"] = ((inner,), ("I32",))
        case _:
            kind = PackedLayout
            parts = {
                "weight_packed": ((outer, -(-inner // count)), ("I32",)),
                "weight_scale": ((outer, groups), FLOATS),
            }
            if not quantization.symmetric:
                parts["weight_zero_point"] = ((-(-outer // count), groups), ("I32",))
    named = {prefix + part: expected for part, expected in parts.items()}
    each = next((size for size in sorted(INT4_GROUPS, reverse=True) if group % size == 0), 0)
    form = PLAIN
    if bits == 4 and each:
        scales = found.get(list(named)[1])
        form = Form("int4", STORED_DTYPES[scales.dtype] if scales and scales.dtype in FLOATS else torch.float16, each)
    return kind(name, shape, named, form, quantization, group)
