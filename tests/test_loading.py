"""The threads that load: in order, and not too far ahead."""

import gc
import re
import shutil
import threading
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from duomoe import LLM, InputError
from duomoe.experts.store import ExpertStore
from duomoe.loading import _Threads
from duomoe.memory.pinned import TOUCHED_BYTES, touched
from duomoe.model_folder import ModelFolder
from duomoe.startup import Startup


@pytest.fixture
def checkpoint() -> Any:
    return ModelFolder().checkpoint


def test_an_error_ends_the_threads_and_drops_what_has_not_begun(checkpoint: Any) -> None:
    started, hold = [], threading.Event()
    count = threading.active_count()

    def job(number: int) -> None:
        started.append(number)
        hold.wait(5)

    with pytest.raises(ZeroDivisionError), _Threads(torch.device("cpu"), checkpoint, Startup()) as threads:
        for number in range(100):
            threads.run(partial(job, number))
        threading.Timer(0.05, hold.set).start()
        _ = 1 / 0
    assert len(started) < 100
    hold.wait(5)
    assert threading.active_count() <= count + 1  # the timer may not have ended


def test_loading_leaves_torch_its_threads(checkpoint: Any) -> None:
    before = torch.get_num_threads()
    with _Threads(torch.device("cpu"), checkpoint, Startup()) as threads:
        assert threads.run(torch.get_num_threads).result() == 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("size", [1, 4096, TOUCHED_BYTES + 1])
def test_touched_memory_can_be_written_to(size: int) -> None:
    memory = touched(size)
    assert memory.shape == (size,) and memory.dtype == torch.uint8
    memory.fill_(7)
    assert int(memory[-1]) == 7


def huge_bytes() -> int:
    """Of this process's memory, what lies in huge pages."""
    found = re.findall(r"^AnonHugePages:\s+(\d+) kB", Path("/proc/self/smaps").read_text(), re.MULTILINE)
    return 1024 * sum(map(int, found))


def system_has_huge_pages() -> bool:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.exists() and "[never]" not in setting.read_text()


@pytest.mark.skipif(not system_has_huge_pages(), reason="the system has no huge pages")
def test_touched_memory_has_huge_pages() -> None:
    before = huge_bytes()
    memory = touched(TOUCHED_BYTES)
    assert huge_bytes() - before >= memory.nbytes // 2  # the system may be short of some


def test_layers_that_do_not_pack_are_counted_once_and_leave_no_memory(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("qwen3_moe", hidden_size=128, moe_intermediate_size=96)
    path = Path(shutil.copytree(model.path, tmp_path / "model"))
    tensors = load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        if ".experts." in name:
            tensor[::2, ::5] = 1e-30  # too many that are far from the others
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, path / "model.safetensors")
    rows, alive = ExpertStore.rows, []

    def followed(store: ExpertStore, expert_format: Any) -> torch.Tensor:
        made = rows(store, expert_format)
        alive.append(weakref.ref(made))
        return made

    monkeypatch.setattr(ExpertStore, "rows", followed)
    gc.disable()
    try:
        options = {"expert_dtype": "bf16-packed", "policy": "lru", "expert_memory": "100%"}
        llm = LLM(path, device="cpu", dtype="bfloat16", **options)
        assert llm.unpacked_layers == list(llm.config.moe_layers)
        assert len(alive) == 2 * len(llm.config.moe_layers)
        assert sum(each() is not None for each in alive) == len(llm.config.moe_layers)
    finally:
        gc.enable()
    assert llm.startup.loaded_bytes == sum(tensor.size for tensor in llm._folder.checkpoint.tensors.values())


def test_a_file_that_vanishes_is_named(tiny: Callable[..., Any], tmp_path: Path) -> None:
    folder = ModelFolder(shutil.copytree(tiny("mixtral").path, tmp_path / "model"))
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors: No such file"):
        LLM(folder, device="cpu")
