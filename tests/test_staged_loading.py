"""Loading as for a GPU, its work done as late as it may: the rows are those that the host makes."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from late_stream import LateStream
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

from duomoe import InputError, checkpoint, loading
from duomoe.experts import conversion, staged
from duomoe.experts.conversion import Conversion
from duomoe.experts.format import ExpertFormat, fp8_format, int4_format, packed_format
from duomoe.experts.store import ExpertStore
from duomoe.loading import _Experts, _Threads
from duomoe.model_folder import ModelFolder
from duomoe.startup import Startup

CPU = torch.device("cpu")
HIDDEN, INTERMEDIATE, EXPERTS = 128, 64, 8
FORMATS = {
    "bf16-packed": packed_format(HIDDEN, INTERMEDIATE),
    "fp8": fp8_format(HIDDEN, INTERMEDIATE),
    "int4": int4_format(HIDDEN, INTERMEDIATE, 64, torch.bfloat16),
}


class LateGpu(TorchFunctionMode):
    """This thread's copies are made by a late stream, and so are the replays of its graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.stream = LateStream()
        self._running = False

    def queue(self, work: Callable[[], object]) -> None:
        def run() -> None:
            self._running = True
            try:
                work()
            finally:
                self._running = False

        self.stream.queue(run)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.copy_ and not self._running:
            self.queue(lambda: function(*args, **(kwargs or {})))
            return args[0]
        return function(*args, **(kwargs or {}))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> LateGpu:
    found = LateGpu()
    monkeypatch.setattr(torch.cuda, "Event", found.stream.event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: found.stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(conversion, "captured", lambda graph, device: contextlib.nullcontext())
    monkeypatch.setattr(Conversion, "run", lambda self: found.queue(lambda: self.holds.copy_(self._fill())))
    for module in (checkpoint, loading):
        monkeypatch.setattr(module, "staging_memory", lambda size: torch.full((size,), 0xFF, dtype=torch.uint8))
    monkeypatch.setattr(loading, "STAGING_BYTES", 0)  # as few buffers as there may be
    return found


@pytest.fixture
def folder(tiny: Callable[..., Any], tmp_path: Path) -> Path:
    """A checkpoint in bfloat16; of one expert, a matrix is stored as float32, which is another kind."""
    model = tiny("qwen3_moe", hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE, num_experts=EXPERTS)
    path = Path(shutil.copytree(model.path, tmp_path / "model"))
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(path / "model.safetensors").items()}
    other = "model.layers.1.mlp.experts.3.up_proj.weight"
    save_file(tensors | {other: tensors[other].float()}, path / "model.safetensors")
    return path


@contextlib.contextmanager
def experts_of(folder: ModelFolder, expert_format: ExpertFormat, on_gpu: bool) -> Iterator[_Experts]:
    startup = Startup()
    with _Threads(CPU, folder.checkpoint, startup) as threads:
        store = ExpertStore(expert_format, EXPERTS, CPU, pin=False)
        found = _Experts(folder, store, CPU, 0, threads, startup)
        found.on_gpu = on_gpu
        yield found


@pytest.mark.parametrize("one_read_bytes", [1 << 30, 0])
@pytest.mark.parametrize("name", FORMATS)
def test_experts_that_pass_through_buffers_are_those_made_on_the_host(
    name: str, one_read_bytes: int, folder: Path, gpu: LateGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staged, "ONE_READ_BYTES", one_read_bytes)
    model, expert_format = ModelFolder(folder), FORMATS[name]
    with experts_of(model, expert_format, on_gpu=False) as expected:
        errors = expected.load([])
    with gpu, experts_of(model, expert_format, on_gpu=True) as found:
        assert found.load([]) == pytest.approx(errors, rel=1e-6)
    assert len(found.conversions) == 2
    assert found.startup.loaded_bytes == expected.startup.loaded_bytes
    for theirs, ours in zip(expected.store.layers, found.store.layers, strict=True):
        for key, values in expert_format.views(theirs).items():
            assert torch.equal(expert_format.views(ours)[key], values)


@pytest.mark.parametrize("problem", [KeyboardInterrupt, InputError])
def test_nothing_is_copied_any_more_when_loading_has_failed(
    problem: type[BaseException], folder: Path, gpu: LateGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, runs = ModelFolder(folder), []
    run = Conversion.run

    def interrupted(self: Conversion) -> None:
        runs.append(run(self))
        if len(runs) == 5:
            raise KeyboardInterrupt

    if problem is InputError:
        file = folder / "model.safetensors"
        os.truncate(file, file.stat().st_size // 2)
    else:
        monkeypatch.setattr(Conversion, "run", interrupted)
    with pytest.raises(problem), gpu, experts_of(model, FORMATS["fp8"], on_gpu=True) as found:
        found.load([])
    assert gpu.stream.queued > 0 and not gpu.stream.work
    assert not model.checkpoint._files


@pytest.mark.parametrize("piece_bytes", [64, 100 << 10, 1 << 20])
def test_dense_weights_cross_piece_by_piece(
    piece_bytes: int, folder: Path, gpu: LateGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "PIECE_BYTES", piece_bytes)
    read = ModelFolder(folder).checkpoint
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        expected = load_file(folder / "model.safetensors")[name]
        for dtype in (torch.bfloat16, torch.float32):
            found = torch.zeros(expected.shape, dtype=dtype)
            with gpu:
                read._read_across(read.tensors[name], found.view(-1))
            assert not gpu.stream.work
            assert torch.equal(found, expected.to(dtype))
    read.close()
