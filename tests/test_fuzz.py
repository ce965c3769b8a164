"""Mutated configs, headers, traces, predictors and command lines: each ends in a result or in one line, soon.

Cases follow from SEED and their number, so one that fails is made again by its number alone. `--long` runs many more.
"""

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from within_time import within_time

from duomoe import InputError, generate, plan, trace, train_predictor
from duomoe.checkpoint import Checkpoint, read_header
from duomoe.config import EngineConfig
from duomoe.errors import LONGEST_MESSAGE
from duomoe.experts import predictor_training as training
from duomoe.experts.predictor import LearnedPredictor, load_predictor, save_predictor
from duomoe.experts.trace import FORMAT as TRACE_FORMAT
from duomoe.experts.trace import Trace
from duomoe.model_folder import ModelFolder
from duomoe.models import Model, architecture_of
from duomoe.models.rope import Rotary

SEED = 17

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 4, 7, 64, 128, 10_000, 2**31 - 1, 2**31, 2**63, 10**30, 10**400),
    *(1e-320, 1e-9, 0.5, 1.0, 2.5, 1e6, 1e30, 1e300, float("nan"), float("inf"), -0.0),
    *("", "x" * 5000, "\x1b[31mred", "\0", "\ud800", "\u2028", "7", "silu", "bfloat16", "yarn", "default", "fp8"),
    *([], {}, [[]], [0] * 1000, [None], {"a": {}}, {"rope_type": "yarn"}, [128, 128], ["x"] * 3),
]

ROPE = ("default", "linear", "dynamic", "yarn", "llama3")
ROPE_KEYS = (
    *("rope_type", "type", "factor", "rope_theta", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    *("attention_factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
)
QUANTIZATION_KEYS = (
    *("quant_method", "bits", "group_size", "version", "zero_point", "desc_act", "sym", "checkpoint_format", "format"),
    *("weight_block_size", "activation_scheme", "fmt", "config_groups", "ignore", "dynamic", "w_bit", "q_group_size"),
)
METHODS = ("fp8", "awq", "gptq", "compressed-tensors")


def survives(number: int, kind: str, case: Callable[[random.Random], Any]) -> bool:
    """Run a case; return whether it had a result. Anything but a result and a good InputError fails the test."""
    with within_time(f"{kind} {number}"):
        try:
            case(random.Random(f"{SEED} {kind} {number}"))
        except InputError as error:
            message = str(error)
            assert len(message) <= 1.1 * LONGEST_MESSAGE and message.isprintable(), f"{kind} {number}"
            return False
        except Exception as error:
            raise AssertionError(f"{kind} {number}: {type(error).__name__}: {error}") from error
        return True


def run(kind: str, count: int, long: bool, case: Callable[[random.Random], Any]) -> None:
    """Run many cases, of which some must have a result and some must be refused, or they say nothing."""
    results = [survives(number, kind, case) for number in range(count * (20 if long else 1))]
    assert 0.02 < sum(results) / len(results) < 0.98


@pytest.fixture
def long(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--long"))


@pytest.fixture(scope="module")
def folders(tiny: Callable[..., Any]) -> list[Path]:
    return [tiny(family).path for family in ("mixtral", "qwen2_moe", "qwen3_moe")]


def changed(draw: random.Random, raw: dict[str, Any]) -> dict[str, Any]:
    """A config with some keys changed, left out, or said in another way."""
    raw = dict(raw)
    for _ in range(draw.choice((1, 1, 2, 3))):
        kind = draw.random()
        if kind < 0.45:
            raw[draw.choice(list(raw))] = draw.choice(VALUES)
        elif kind < 0.55:
            raw.pop(draw.choice(list(raw)))
        elif kind < 0.8:
            scaling: dict[str, Any] = {"rope_type": draw.choice(ROPE), "factor": draw.choice((2.0, 4))}
            scaling |= {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 64}
            scaling |= {draw.choice(ROPE_KEYS): draw.choice(VALUES) for _ in range(draw.choice((0, 1, 2)))}
            raw[draw.choice(("rope_parameters", "rope_scaling"))] = scaling
        else:
            quantization = {"quant_method": draw.choice(METHODS), "bits": 4, "group_size": 64}
            quantization |= {draw.choice(QUANTIZATION_KEYS): draw.choice(VALUES) for _ in range(draw.choice((0, 1, 2)))}
            raw["quantization_config"] = quantization
    return raw


def test_configs(folders: list[Path], long: bool) -> None:
    configs = [json.loads((folder / "config.json").read_text()) for folder in folders]

    def case(draw: random.Random) -> None:
        raw = changed(draw, draw.choice(configs))
        config = architecture_of(raw).parse(raw)
        rotary = Rotary(config.rope, torch.device("cpu"))
        positions = torch.tensor([0, 5, config.max_position - 1])
        cos, sin = rotary.cos_sin(positions, positions + 1)
        assert bool(cos.isfinite().all()) and bool(sin.isfinite().all())

    run("config", 700, long, case)


def test_folders_with_changed_configs(folders: list[Path], tmp_path: Path, long: bool) -> None:
    copies = [Path(shutil.copytree(folder, tmp_path / str(number))) for number, folder in enumerate(folders)]
    configs = [(folder, json.loads((folder / "config.json").read_text())) for folder in copies]

    def case(draw: random.Random) -> None:
        folder, raw = draw.choice(configs)
        (folder / "config.json").write_text(json.dumps(changed(draw, raw)))
        EngineConfig(device="cpu", max_model_len=32).plan(folder)

    run("folder", 250, long, case)


def mutated(draw: random.Random, content: bytes) -> bytes:
    """A file with some bytes changed, cut out or doubled, most of them in its header."""
    for _ in range(draw.choice((1, 1, 2, 5))):
        at = draw.randrange(min(len(content), draw.choice((8, 16, 4000, len(content)))) or 1)
        size = draw.choice((1, 1, 2, 8, 100))
        new = draw.choice((bytes([draw.randrange(256)]) * size, b"", content[at : at + size] * 2, b"9" * size, b"\xff"))
        content = content[:at] + new + content[at + size :]
    return content


def header_of(draw: random.Random, header: dict[str, Any]) -> bytes:
    """A header in which some values are others, as it is written."""
    header = json.loads(json.dumps(header))
    for _ in range(draw.choice((1, 1, 2))):
        name = draw.choice(list(header))
        kind, key = draw.random(), draw.choice(("dtype", "shape", "data_offsets"))
        if kind < 0.3 and isinstance(header[name], dict):
            header[name][key] = draw.choice(
                [*VALUES, ["F8_E5M2"], [0, 0], [1] * 300_000, "C64", "F8_E4M3", [2**62] * 3]
            )
        elif kind < 0.5:
            header[name] = draw.choice(VALUES)
        elif kind < 0.7:
            header[draw.choice(("", "\x1b[2J", "x" * 3000, "__metadata__", name + "x"))] = header.pop(name)
        else:
            header.pop(name)
    return json.dumps(header).encode()


def parts_of(file: Path) -> tuple[dict[str, Any], bytes]:
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def test_headers(folders: list[Path], tmp_path: Path, long: bool) -> None:
    folder = Path(shutil.copytree(folders[2], tmp_path / "model"))
    file = folder / "model.safetensors"
    whole, (header, data) = file.read_bytes(), parts_of(file)

    def case(draw: random.Random) -> None:
        kind = draw.random()
        if kind < 0.5:
            text = header_of(draw, header)
            file.write_bytes(struct.pack("<Q", len(text)) + text + data)
        else:
            file.write_bytes(mutated(draw, whole))
        tensors = read_header(file)
        checkpoint = Checkpoint(folder)
        if kind < 0.7:
            ModelFolder(folder)
        for name in list(tensors)[:3]:
            if checkpoint.tensors[name].dtype == "F32":
                checkpoint.read(name)

    run("header", 450, long, case)


@pytest.fixture(scope="module")
def small(folders: list[Path]) -> Model:
    folder = ModelFolder(folders[2])
    return Model(folder.architecture, folder.config, torch.device("cpu"), torch.float32, compiled=False)


DTYPES = (torch.float8_e4m3fn, torch.complex64, torch.int64, torch.float64, torch.uint8, torch.bool, torch.bfloat16)


def spoil(draw: random.Random, tensors: dict[str, Any], metadata: dict[str, str], file: Path) -> None:
    """Write a file of tensors in which something is not as it was."""
    tensors, metadata, name = dict(tensors), dict(metadata), draw.choice(list(tensors))
    tensor, kind = tensors.pop(name), draw.random()
    if kind < 0.15:
        tensors[name] = tensor.to(draw.choice(DTYPES))
    elif kind < 0.3:
        tensors[name] = tensor[draw.choice((0, slice(1, None), slice(0, 0), None))]
    elif kind < 0.4:
        tensors[draw.choice(("x", "", "experts", "self"))] = tensor
    elif kind < 0.5:
        tensors[name] = tensor
    else:
        tensors[name] = tensor
        key = draw.choice([*metadata, "more"])
        if draw.random() < 0.3:
            metadata.pop(key, None)
        else:
            metadata[key] = draw.choice(
                ("", "0", "-1", "8", "9" * 5000, "x", "\x1b[31m", "1e3", "٣", metadata["format"])
            )
    save_file({key: value.contiguous() for key, value in tensors.items()}, file, metadata)
    if kind > 0.7:
        file.write_bytes(mutated(draw, file.read_bytes()))


def test_traces(small: Model, tmp_path: Path, long: bool) -> None:
    layers, hidden = len(small.config.moe_layers), small.config.hidden_size
    tensors = {
        "experts": torch.arange(3, dtype=torch.int16).expand(10, layers, 3),
        "request": torch.arange(10, dtype=torch.int32),
        "position": torch.arange(10, dtype=torch.int32),
        "decode": torch.ones(10, dtype=torch.bool),
        "hidden": torch.zeros(10, layers, hidden, dtype=torch.bfloat16),
    }
    metadata = {"format": TRACE_FORMAT, "fingerprint": "abc", "num_experts": "8"}

    def case(draw: random.Random) -> None:
        spoil(draw, tensors, metadata, tmp_path / "trace")
        found = Trace.load(tmp_path / "trace", "abc")
        training.check(found, small, needs_hidden=draw.random() < 0.5)
        training.split(found)

    run("trace", 250, long, case)


def test_predictors(small: Model, tmp_path: Path, long: bool) -> None:
    c, rank = small.config, 5
    layers, experts = len(c.moe_layers), c.num_experts
    sizes = dict(layers=layers, experts=experts, hidden=c.hidden_size, rank=rank, horizon=2, width=4)
    tensors = {name: torch.zeros([sizes[dim] for dim in dims]) for name, dims in LearnedPredictor.SHAPES.items()}
    save_predictor(tmp_path / "p", "learned", "abc", tensors)
    metadata = {"format": "duomoe-predictor-1", "kind": "learned", "fingerprint": "abc"}

    def case(draw: random.Random) -> None:
        spoil(draw, tensors, metadata, tmp_path / "p")
        load_predictor(tmp_path / "p", small, "abc")

    run("predictor", 250, long, case)


WORDS = (
    *("", "0", "-1", "1", "8", "64", "9" * 5000, "1e9", "nan", "1GiB", "15%", "0%", "cpu", "auto", "float32", "plain"),
    *("duo", "lru", "resident", "int4", "gate", "none", "\x1b[31m", "\udcff", "a\0b", "/" * 5000, "x" * 5000, "a/b"),
    *("/dev/null", "/dev/zero/x", "/proc/self/mem", "/", ".", "..", "~", "--", "-", "10us", "25GB/s", "٣"),
)


def test_command_lines(folders: list[Path], tmp_path: Path, long: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Of all commands; those that would compute for long are given something that they refuse."""
    commands: dict[ModuleType, list[str]] = {
        plan: [],
        trace: ["--prompts", str(tmp_path / "none"), "--out", str(tmp_path / "out")],
        train_predictor: ["--trace", str(tmp_path / "none"), "--kind", "gate", "--out", str(tmp_path / "out")],
        generate: ["--prompt", "x" * 9, "--stop", "", "--max-new-tokens", "0"],
    }
    flags = {each: [*each.parser()._option_string_actions, "--nonsense"] for each in commands}
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    words = [*WORDS, str(tmp_path), str(tmp_path / "loop"), *map(str, folders)]

    def case(draw: random.Random) -> None:
        command = draw.choice([plan, plan, *commands])
        args = ["--model", str(folders[0]), *commands[command]]
        args += [] if command is train_predictor else ["--device", "cpu"]
        for _ in range(draw.choice((0, 1, 1, 2))):
            flag = draw.choice(flags[command])
            if flag not in ("-h", "--help"):
                args.append(flag)
                args += [draw.choice(words)] if draw.random() < 0.95 else []
        code = command.main(args)
        err = capsys.readouterr().err
        assert code in (0, 2) and "Traceback" not in err, (args, err)
        if code == 2:
            last = err.removesuffix("\n").split("\n")[-1]
            assert last.startswith("duomoe: error: "), (args, err)
            raise InputError(last)

    run("command", 500, long, case)
