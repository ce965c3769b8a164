"""Formats of experts: from a checkpoint's tensors into rows, and what rows are worth."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from stored_cases import Stored, awq, fp8, generator, gptq, pack_quantized, plain, scaled
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from duomoe import InputError
from duomoe.checkpoint import Checkpoint
from duomoe.experts.compute import ExpertSum, LayerSum, worth_expanding
from duomoe.experts.conversion import Conversion
from duomoe.experts.format import ALIGNMENT, ExpertFormat, fp8_format, int4_format, packed_format, plain_format
from duomoe.experts.matrix import DoesNotPack, PlainMatrix, to_fp8, to_int4
from duomoe.experts.staged import staged_expert
from duomoe.experts.stored import Filled, StoredMatrices, fill_row
from duomoe.kernels import expand
from duomoe.kernels.quantised import dequantise
from duomoe.models.batch import Routing
from duomoe.models.config import Quantization, parse_quantization
from duomoe.models.weights import Sources

FP8 = parse_quantization(dict(quant_method="fp8", weight_block_size=[128, 128]))
AWQ = parse_quantization(dict(quant_method="awq", bits=4, group_size=64, version="gemm"))
GPTQ = parse_quantization(dict(quant_method="gptq", bits=4, group_size=64))
GPTQ_V2 = parse_quantization(dict(quant_method="gptq", bits=4, group_size=64, checkpoint_format="gptq_v2"))

# hidden, intermediate; the second has parts of blocks, of chunks and of groups everywhere
SHAPES = [(128, 64), (200, 72)]
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class Layer:
    """A checkpoint with the experts of one layer, their sources, and the values that they should have."""

    def __init__(self, folder: Path, make: Stored, hidden: int, intermediate: int, experts: int = 2) -> None:
        self.hidden, self.intermediate = hidden, intermediate
        self.tensors: dict[str, Tensor] = {}
        self.values: list[dict[str, Tensor]] = []
        self.sources: list[dict[str, Sources]] = []
        self.folder = folder
        shapes = [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
        for expert in range(experts):
            values, names = [], [f"experts.{expert}.{name}" for name in PROJECTIONS]
            for name, shape in zip(names, shapes, strict=True):
                stored, value = make(len(self.tensors), *shape)
                self.tensors |= {f"{name}.{part}": tensor for part, tensor in stored.items()}
                values.append(value)
            self.values.append({"gate_up": torch.cat(values[:2]), "down": values[2]})
            gate, up, down = [(f"{name}.weight", shape) for name, shape in zip(names, shapes, strict=True)]
            self.sources.append({"gate_up": [gate, up], "down": [down]})

    def stored(self, quantization: Quantization | None) -> StoredMatrices:
        save_file(self.tensors, self.folder / "model.safetensors")
        (self.folder / "config.json").write_text("{}")
        found = StoredMatrices(Checkpoint(self.folder), quantization)
        found.check(self.expected())
        return found

    def expected(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        for expert in self.sources:
            for sources in expert.values():
                yield from sources

    def rows(self, expert_format: ExpertFormat) -> Tensor:
        return torch.full((len(self.sources), expert_format.row_bytes), 0xFF, dtype=torch.uint8)

    def values_of(self, views: dict[str, Tensor], expert: int) -> dict[str, Tensor]:
        """What an expert's row is worth."""
        found = {}
        for name, inner, matrices in (("gate_up", self.hidden, 2), ("down", self.intermediate, 1)):
            also = (
                views[name + suffix][expert] if name + suffix in views else None for suffix in ("_scales", "_zeros")
            )
            found[name] = dequantise(views[name][expert], *also, inner, matrices)
        return found


def fill_rows(
    stored: StoredMatrices, expert_format: ExpertFormat, experts: list[dict[str, Sources]], rows: Tensor
) -> Filled:
    """Fill the rows of several experts."""
    together = Filled()
    for sources, row in zip(experts, rows, strict=True):
        together.add(fill_row(stored, expert_format, sources, row))
    return together


CASES = {
    "fp8": (FP8, fp8, fp8_format),
    "fp8 with float32 scales": (FP8, lambda *args: fp8(*args, torch.float32), fp8_format),
    "awq": (AWQ, awq, lambda *shape: int4_format(*shape, 64, torch.float16)),
    "gptq": (GPTQ, gptq, lambda *shape: int4_format(*shape, 64, torch.float16)),
    "gptq symmetric": (GPTQ, lambda *args: gptq(*args, True), lambda *shape: int4_format(*shape, 64, torch.float16)),
    "gptq_v2": (GPTQ_V2, lambda *args: gptq(*args, less=0), lambda *shape: int4_format(*shape, 64, torch.float16)),
    "plain packed": (None, plain, packed_format),
    "awq that left experts packed": (AWQ, plain, packed_format),
    "awq that left experts plain": (AWQ, plain, lambda *shape: plain_format(*shape, torch.float32)),
    "awq made plain": (AWQ, awq, lambda *shape: plain_format(*shape, torch.float32)),
    "fp8 made plain": (FP8, fp8, lambda *shape: plain_format(*shape, torch.float32)),
}


MADE_ON_A_GPU = CASES | {
    "quantised to fp8": (None, plain, fp8_format),
    "quantised to int4": (None, plain, lambda *shape: int4_format(*shape, 128, torch.float16)),
    "compressed-tensors": (
        Quantization("packed", 4, block=(1, 0), symmetric=False),
        lambda *args: pack_quantized(*args, symmetric=False, group=0),
        lambda *shape: int4_format(*shape, 128, torch.bfloat16),
    ),
    "fp8 of one scale": (Quantization("scaled"), lambda *args: scaled(*args, scale_shape="one"), fp8_format),
    "fp8 per channel made plain": (
        Quantization("scaled", block=(1, 0)),
        lambda *args: scaled(*args, block=(1, 0), scale_dtype=torch.bfloat16),
        lambda *shape: plain_format(*shape, torch.bfloat16),
    ),
    "gptq of 8 bits made plain": (
        Quantization("gptq", 8, block=(1, 32), zero_offset=1),
        lambda *args: gptq(*args, group=32, bits=8),
        lambda *shape: plain_format(*shape, torch.bfloat16),
    ),
}


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (2048, 768)])
@pytest.mark.parametrize("case", MADE_ON_A_GPU)
def test_rows_made_on_a_gpu_are_those_made_on_the_host(case: str, shape: tuple[int, int], tmp_path: Path) -> None:
    quantization, make, format_of = MADE_ON_A_GPU[case]
    layer = Layer(tmp_path, make, *shape)
    stored, expert_format = layer.stored(quantization), format_of(*shape)
    rows = layer.rows(expert_format)
    on_host = fill_rows(stored, expert_format, layer.sources, rows)
    experts = [staged_expert(stored, sources) for sources in layer.sources]
    conversion = Conversion(stored, expert_format, experts[0], torch.device("cuda"))
    for expert, row in zip(experts, rows, strict=True):
        memory = torch.empty(expert.buffer_bytes, dtype=torch.uint8)
        stored.checkpoint.read_parts([part for parts in expert.matrices for part in parts], memory)
        conversion.send(memory)
        conversion.run()
        assert conversion.holds
        assert torch.equal(conversion.row.cpu()[written(expert_format)], row[written(expert_format)])
    filled = Filled(*conversion.squares.tolist())
    assert filled.error == pytest.approx(on_host.error)


def written(expert_format: ExpertFormat) -> Tensor:
    """Which bytes of a row hold anything."""
    found = torch.zeros(expert_format.row_bytes, dtype=torch.bool)
    for item in expert_format.tensors.values():
        found[item.offset : item.offset + item.size] = True
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_rows_are_worth_what_the_checkpoint_is_bit_for_bit(case: str, shape: tuple[int, int], tmp_path: Path) -> None:
    quantization, make, format_of = CASES[case]
    layer = Layer(tmp_path, make, *shape)
    expert_format = format_of(*shape)
    rows = layer.rows(expert_format)
    filled = fill_rows(layer.stored(quantization), expert_format, layer.sources, rows)
    assert filled.error == 0
    views = expert_format.views(rows)
    for expert, values in enumerate(layer.values):
        found = layer.values_of(views, expert)
        assert torch.equal(found["gate_up"], values["gate_up"])
        assert torch.equal(found["down"], values["down"])


def test_fp8_values_are_those_of_transformers() -> None:
    stored, values = fp8(0, 256, 384, torch.float32)
    theirs = Fp8Dequantize(SimpleNamespace())._dequantize_one(stored["weight"], stored["weight_scale_inv"])
    assert torch.equal(values, theirs)


def values_of_compressed_tensors(stored: dict[str, Tensor], outer: int, inner: int) -> Tensor:
    """What a matrix in that library's layout is worth."""
    q = unpack_from_int32(stored["x.weight_packed"], 4, torch.Size((outer, inner)))
    zero = unpack_from_int32(stored["x.weight_zero_point"], 4, torch.Size((outer, -(-inner // 64))), packed_dim=0)
    scale = stored["x.weight_scale"]
    zero, scale = (each.float().repeat_interleave(64, 1)[:, :inner] for each in (zero, scale))
    return (q.float() - zero) * scale


def test_awq_values_are_those_of_compressed_tensors() -> None:
    stored, values = awq(0, 72, 200)
    theirs = AutoAWQConverter(group_size=64).process({f"x.{name}": tensor for name, tensor in stored.items()})
    assert torch.equal(values, values_of_compressed_tensors(theirs, 72, 200))


def test_gptq_values_are_those_of_compressed_tensors() -> None:
    """Whose layout is that of GPTQ, transposed, but for zero points less one."""
    stored, values = gptq(0, 72, 200, less=0)
    theirs = {
        "x.weight_packed": stored["qweight"].T.contiguous(),
        "x.weight_zero_point": stored["qzeros"].T.contiguous(),
        "x.weight_scale": stored["scales"].T,
    }
    assert torch.equal(values, values_of_compressed_tensors(theirs, 72, 200))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("format_of", "worst"),
    [(fp8_format, 0.04), (lambda *shape: int4_format(*shape, 128, torch.float16), 0.13)],
    ids=["fp8", "int4"],
)
def test_quantised_while_loading(
    format_of: Callable[..., ExpertFormat], worst: float, shape: tuple[int, int], tmp_path: Path
) -> None:
    layer = Layer(tmp_path, plain, *shape)
    expert_format = format_of(*shape)
    rows = layer.rows(expert_format)
    filled = fill_rows(layer.stored(None), expert_format, layer.sources, rows)
    views, difference, norm = expert_format.views(rows), 0.0, 0.0
    for expert, values in enumerate(layer.values):
        for name, found in layer.values_of(views, expert).items():
            difference += float((found - values[name]).square().sum(dtype=torch.float64))
            norm += float(values[name].square().sum(dtype=torch.float64))
    assert filled.error == pytest.approx((difference / norm) ** 0.5)
    assert 0.001 < filled.error < worst  # of normally distributed weights


@given(
    outer=st.integers(1, 140),
    inner=st.integers(1, 300),
    scale=st.sampled_from([0.0, 1e-9, 0.02, 1.0, 1e4]),
    shift=st.sampled_from([0.0, 3.0, -3.0]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_no_value_is_further_off_than_half_a_step(
    outer: int, inner: int, scale: float, shift: float, seed: int
) -> None:
    values = (torch.randn(outer, inner, generator=generator(seed)) + shift) * scale
    int4 = to_int4(PlainMatrix(values), 64, torch.float32)
    step = int4.scales.repeat_interleave(64, 1)[:, :inner]
    # A rounded zero point may cost the ends of the range another half.
    assert bool(((int4.values() - values).abs() <= 1.01 * step).all())
    again = to_int4(int4, 64, torch.float32)
    assert again is int4
    fp8_ = to_fp8(PlainMatrix(values))
    largest = fp8_.scales.repeat_interleave(128, 0)[:outer].repeat_interleave(128, 1)[:, :inner] * 448
    assert bool((values.abs() <= largest * 1.0001).all())
    # Three bits of mantissa, and steps of 2 ** -9 among the smallest.
    assert bool(((fp8_.values() - values).abs() <= values.abs() / 16 * 1.001 + largest / 448 / 1024).all())


@pytest.mark.parametrize(
    "format_of", [fp8_format, lambda *shape: int4_format(*shape, 64, torch.bfloat16), packed_format]
)
@given(hidden=st.integers(1, 300), inner=st.integers(1, 300), n=st.integers(1, 3))
@settings(deadline=None, max_examples=30)
def test_views_cover_a_row_without_overlap(
    format_of: Callable[..., ExpertFormat], hidden: int, inner: int, n: int
) -> None:
    row = format_of(hidden, inner)
    assert row.row_bytes % ALIGNMENT == 0
    rows = torch.zeros(n, row.row_bytes, dtype=torch.uint8)
    ends = 0
    for item in row.tensors.values():
        assert item.offset % ALIGNMENT == 0 and item.offset >= ends
        ends = item.offset + item.size
    for index, view in enumerate(row.views(rows).values(), start=1):
        view.view(torch.uint8).fill_(index)
    for index, view in enumerate(row.views(rows).values(), start=1):
        assert (view.view(torch.uint8) == index).all()


def test_the_bytes_of_real_experts() -> None:
    """An expert's row against two bytes a weight: a half, a quarter or three quarters, and little more."""
    for hidden, inner in ((2048, 768), (4096, 14336)):
        plain_bytes = plain_format(hidden, inner, torch.bfloat16).row_bytes
        assert fp8_format(hidden, inner).row_bytes < 0.501 * plain_bytes
        assert int4_format(hidden, inner, 128, torch.float16).row_bytes < 0.263 * plain_bytes
        assert packed_format(hidden, inner).row_bytes < 0.759 * plain_bytes


@pytest.mark.parametrize("tokens", [1, 20])  # GEMV and GEMM
@pytest.mark.parametrize("case", ["fp8", "awq"])
def test_the_sum_over_quantised_experts_is_that_of_their_values(case: str, tokens: int, tmp_path: Path) -> None:
    quantization, make, format_of = CASES[case]
    layer, random = Layer(tmp_path, make, 200, 72, experts=4), generator(1)
    stored = layer.stored(quantization)
    h = torch.randn(tokens, 200, generator=random)
    chosen = torch.rand(tokens, 4, generator=random).argsort(1)[:, :2].int()
    routing = Routing(experts=chosen, weights=torch.rand(tokens, 2, generator=random))
    totals = []
    for expert_format in (format_of(200, 72), plain_format(200, 72, torch.float32)):
        rows = layer.rows(expert_format)
        fill_rows(stored, expert_format, layer.sources, rows)
        total = ExpertSum(h, routing, 4, 72, expert_format)
        total.wave(expert_format.views(rows), torch.arange(4, dtype=torch.int32))
        totals.append(total.total())
    assert torch.equal(*totals)


def test_fp8_activations_are_close_and_the_same_in_waves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantization, make, _ = CASES["fp8"]
    layer, random = Layer(tmp_path, make, 200, 72, experts=4), generator(1)
    h = torch.randn(20, 200, generator=random)
    chosen = torch.rand(20, 4, generator=random).argsort(1)[:, :2].int()
    routing = Routing(experts=chosen, weights=torch.rand(20, 2, generator=random))
    weights_only, both = fp8_format(200, 72), fp8_format(200, 72, fp8_activations=True)
    rows = layer.rows(both)
    fill_rows(layer.stored(quantization), both, layer.sources, rows)

    def total(h: Tensor, expert_format: ExpertFormat, *waves: list[int]) -> Tensor:
        sums = ExpertSum(h, routing, 4, 72, expert_format)
        for slots in waves:
            sums.wave(expert_format.views(rows), torch.tensor(slots, dtype=torch.int32))
        return sums.total()

    exact = total(h.bfloat16(), weights_only, [0, 1, 2, 3])
    assert torch.equal(total(h.bfloat16(), both, [0, 1, 2, 3]), exact)  # the CPU has no products in fp8
    monkeypatch.setattr("duomoe.experts.compute.capability", lambda device: 90)
    assert torch.equal(total(h, both, [0, 1, 2, 3]), total(h, weights_only, [0, 1, 2, 3]))
    in_fp8 = total(h.bfloat16(), both, [0, 1, 2, 3])
    assert torch.equal(total(h.bfloat16(), both, [-1, 1, -1, 3], [0, -1, 2, -1]), in_fp8)
    error = (in_fp8.float() - exact.float()).norm() / exact.float().norm()
    assert 0.005 < error < 0.06


def test_one_matrix_that_does_not_pack_is_enough(tmp_path: Path) -> None:
    layer, expert_format = Layer(tmp_path, plain, 200, 72), packed_format(200, 72)
    layer.tensors["experts.1.up_proj.weight"][::2, ::5] = 1e-30  # too many that are far from the others
    with pytest.raises(DoesNotPack):
        fill_rows(layer.stored(None), expert_format, layer.sources, layer.rows(expert_format))


@pytest.mark.parametrize("case", ["fp8", "awq", "plain packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_expanded_experts_give_the_same_sum(
    case: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two chunks with many tokens and one with few, in two waves, expanded by twos."""
    quantization, make, format_of = CASES[case]
    layer, random, expert_format = Layer(tmp_path, make, 200, 72, experts=5), generator(1), format_of(200, 72)
    rows = layer.rows(expert_format)
    fill_rows(layer.stored(quantization), expert_format, layer.sources, rows)
    plain_rows = layer.rows(plain := plain_format(200, 72, dtype))
    fill_rows(layer.stored(quantization), plain, layer.sources, plain_rows)
    chunks = []
    for tokens in (20, 30, 2):
        chosen = torch.rand(tokens, 5, generator=random).argsort(1)[:, :2].int()
        routing = Routing(experts=chosen, weights=torch.rand(tokens, 2, generator=random))
        chunks.append((torch.randn(tokens, 200, generator=random).to(dtype), routing))
    monkeypatch.setattr("duomoe.experts.compute.EXPANDED_BYTES", 2 * plain.row_bytes)
    expanded = []
    monkeypatch.setattr("duomoe.experts.compute.expand", lambda *args: expanded.append(args[5]) or expand(*args))

    def totals(views: dict[str, Tensor], form: ExpertFormat, expands: bool) -> list[Tensor]:
        total = LayerSum([ExpertSum(h, routing, 5, 72, form) for h, routing in chunks], expands)
        total.wave(views, torch.tensor([0, -1, 2, -1, 4], dtype=torch.int32), 3)
        total.wave(views, torch.tensor([-1, 1, -1, 3, -1], dtype=torch.int32), 4)
        return total.totals()

    in_slots = totals(expert_format.views(rows), expert_format, True)
    assert expanded == [0, 0, 2, 2, 0, 0, 2, 2]
    expected = totals(plain.views(plain_rows), plain, False)
    with_many = 3 if case == "plain packed" else 2  # a GEMV does not round quantised values
    for found, wanted in zip(in_slots[:with_many], expected[:with_many], strict=True):
        assert torch.equal(found, wanted)
    if case != "plain packed":  # which are always expanded
        for found, wanted in zip(in_slots, totals(expert_format.views(rows), expert_format, False), strict=True):
            assert torch.equal(found, wanted)
        assert len(expanded) == 8


def broken(layer: Layer, quantization: Quantization | None, expert_format: ExpertFormat, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        fill_rows(layer.stored(quantization), expert_format, layer.sources, layer.rows(expert_format))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("case", "part", "change", "words"),
    [
        ("fp8", "weight_scale_inv", None, ["no tensor"]),
        ("fp8", "weight_scale_inv", lambda t: t[:, :1].contiguous(), ["[1, 1]", "[1, 2]"]),
        ("fp8", "weight", lambda t: t.to(torch.float8_e5m2), ["F8_E5M2", "F8_E4M3"]),
        ("awq", "scales", None, ["no tensor"]),
        ("awq", "scales", lambda t: t.int(), ["I32", "F16"]),
        ("awq", "qzeros", lambda t: t[:1].contiguous(), ["[1, 9]", "[4, 9]"]),
        ("awq", "qweight", lambda t: t.T.contiguous(), ["[9, 200]", "[200, 9]"]),
        ("gptq", "qweight", lambda t: t.long(), ["I64", "I32"]),
        ("gptq", "g_idx", lambda t: t.flip(0).contiguous(), ["desc_act", "order", "up_proj.weight"]),
    ],
)
def test_tensors_that_do_not_fit(
    case: str, part: str, change: Callable[[Tensor], Tensor] | None, words: list[str], tmp_path: Path
) -> None:
    quantization, make, format_of = CASES[case]
    layer, name = Layer(tmp_path, make, 200, 72), f"experts.1.up_proj.{part}"
    if change is None:
        del layer.tensors[name]
    else:
        layer.tensors[name] = change(layer.tensors[name])
    expected = [name] if part in ("weight_scale_inv", "scales") and change is None else ["experts.1.up_proj"]
    broken(layer, quantization, format_of(200, 72), *words, *expected)


@pytest.mark.parametrize(
    ("case", "part", "change"),
    [
        ("fp8", "weight_scale_inv", lambda t: t * float("nan")),
        ("fp8", "weight", lambda t: torch.full_like(t.view(torch.uint8), 0x7F).view(t.dtype)),
        ("fp8", "weight", lambda t: torch.full_like(t.view(torch.uint8), 0xFF).view(t.dtype)),
        ("awq", "scales", lambda t: t * float("inf")),
        ("gptq", "scales", lambda t: t * float("nan")),
    ],
)
@pytest.mark.parametrize("plainly", [False, True])
def test_quantised_matrices_that_are_not_finite_are_named(
    case: str, part: str, change: Callable[[Tensor], Tensor], plainly: bool, tmp_path: Path
) -> None:
    quantization, make, format_of = CASES[case]
    layer, name = Layer(tmp_path, make, 200, 72), f"experts.1.up_proj.{part}"
    layer.tensors[name] = change(layer.tensors[name])
    expert_format = plain_format(200, 72, torch.float32) if plainly else format_of(200, 72)
    filled = fill_rows(layer.stored(quantization), expert_format, layer.sources, layer.rows(expert_format))
    assert filled.not_finite == ["experts.1.up_proj.weight"]


@pytest.mark.parametrize(("quantization", "less"), [(GPTQ, 0), (GPTQ_V2, 1)])
def test_zero_points_of_the_other_version_of_gptq_are_noticed(
    quantization: Quantization, less: int, tmp_path: Path
) -> None:
    layer = Layer(tmp_path, lambda *args: gptq(*args, symmetric=True, less=less), 200, 72)
    other = "gptq" if less else "gptq_v2"
    broken(layer, quantization, int4_format(200, 72, 64, torch.float16), "checkpoint_format", f"format {other},")
    asymmetric = replace(quantization, symmetric=False)  # then they may be so by chance
    expert_format = int4_format(200, 72, 64, torch.float16)
    fill_rows(layer.stored(asymmetric), expert_format, layer.sources, layer.rows(expert_format))


def test_shapes_that_int4_cannot_hold(tmp_path: Path) -> None:
    layer = Layer(tmp_path, plain, 64, 20)
    layer.tensors = {"x": torch.zeros(1)}
    broken(layer, AWQ, int4_format(64, 20, 64, torch.float16), "gate_proj.qweight", "[20, 64]")


@pytest.mark.parametrize("format_of", [fp8_format, lambda *shape: int4_format(*shape, 64, torch.float16)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_cannot_be_quantised(format_of: Callable[..., ExpertFormat], value: float, tmp_path: Path) -> None:
    layer = Layer(tmp_path, plain, 64, 24)
    layer.tensors["experts.1.down_proj.weight"][3, 5] = value
    broken(layer, None, format_of(64, 24), "experts.1.down_proj.weight", "NaN")


def test_quantised_experts_are_expanded_for_long_passes_only() -> None:
    int4, fp8 = int4_format(64, 32, 64, torch.float16), fp8_format(64, 32)
    assert [worth_expanding(int4, pairs, 8) for pairs in (512 * 8 - 1, 512 * 8)] == [False, True]
    assert [worth_expanding(fp8, pairs, 8) for pairs in (1024 * 8 - 1, 1024 * 8)] == [False, True]
    assert not worth_expanding(fp8_format(64, 32, fp8_activations=True), 1 << 20, 8)
    assert not worth_expanding(plain_format(64, 32, torch.bfloat16), 1 << 20, 8)
