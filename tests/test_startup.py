"""The parts of a start: timed, shown one at a time, and told in the summary."""

import errno
import json
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from triton import knobs

from duomoe import LLM
from duomoe.generate import main
from duomoe.kernel_cache import check_kernel_cache
from duomoe.startup import PARTS, Startup


def test_parts_add_up_and_are_shown_one_at_a_time(capfd: pytest.CaptureFixture[str]) -> None:
    startup = Startup(quiet=False)
    with startup.part("opening"):
        time.sleep(0.01)
    with startup.part("opening"):
        time.sleep(0.01)
    with startup.part("loading", total_bytes=2_000_000):
        for _ in range(2):
            time.sleep(0.15)  # the line is not written more often
            startup.load(1_000_000)
    startup.spend("reading", 1.5)
    assert startup.seconds["opening"] >= 0.02 and startup.seconds["reading"] == 1.5
    assert startup.loaded_bytes == 2_000_000
    assert set(startup.as_dict()) == {f"{part}_s" for part in PARTS} | {"loaded_bytes", "compiled_kernels"}
    shown = capfd.readouterr().err
    assert re.search(r"opening.*loading", shown, re.DOTALL) and "2.00M/2.00M" in shown and "B/s" in shown
    assert "\n" not in shown, "more than one line"


def test_a_quiet_start_shows_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    LLM()
    assert capfd.readouterr() == ("", "")


def test_kernels_are_counted_for_as_long_as_asked_and_others_still_hear_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heard: list[bool] = []
    monkeypatch.setattr(knobs.compilation, "listener", lambda **event: heard.append(event["cache_hit"]))
    startup = Startup()

    class Times:
        total = 2_000_000

    def tell(cache_hit: bool) -> None:
        knobs.compilation.listener(src=None, metadata={}, metadata_group={}, times=Times(), cache_hit=cache_hit)

    with startup.counting_kernels():
        tell(True)
        tell(False)
    tell(False)
    assert heard == [True, False, False]
    assert startup.compiled_kernels == 1 and startup.seconds["compiling"] == 2.0


def test_the_command_tells_the_parts(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--prompt", "The sea", "--max-new-tokens", "2"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["start"]
    assert found["loading_s"] > 0 and found["reading_s"] > 0 and found["opening_s"] > 0
    # All that was read of the model: its weights, once.
    assert found["loaded_bytes"] == sum(tensor.size for tensor in LLM()._folder.checkpoint.tensors.values())
    assert main([*arguments, "--verbose"]) == 0
    assert re.search(r"duomoe: start: importing \d.*, loading .*GB/s: reading .*capturing", capsys.readouterr().err)


@pytest.mark.parametrize("problem", ["no folder", "full"])
def test_where_kernels_cannot_be_kept_it_is_said_and_goes_on(
    problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "kernels"
    if problem == "no folder":
        folder.write_text("a file")
    else:
        monkeypatch.setattr(os, "posix_fallocate", no_space)
    monkeypatch.setattr(knobs.cache, "dir", str(folder))
    with pytest.warns(RuntimeWarning, match="compiled kernels cannot be kept.*TRITON_CACHE_DIR") as warned:
        check_kernel_cache()
    assert "\n" not in str(warned[0].message)
    assert knobs.cache.dir != str(folder)
    (Path(knobs.cache.dir) / "kernel").write_text("can be written")


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_folder_for_kernels_that_can_be_written_to_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path / "kernels"))
    check_kernel_cache()
    assert knobs.cache.dir == str(tmp_path / "kernels")
    assert list((tmp_path / "kernels").iterdir()) == []


@pytest.mark.parametrize("expert_dtype", ["plain", "int4"])
def test_an_interrupt_while_loading_leaves_no_threads(
    expert_dtype: str, tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny("mixtral").path

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Startup, "load", interrupted)
        with pytest.raises(KeyboardInterrupt):
            LLM(path, device="cpu", expert_dtype=expert_dtype)
    names = [thread.name for thread in threading.enumerate()]
    assert not any(name.startswith(("duomoe-load", "duomoe-rows")) for name in names)
    LLM(path, device="cpu", expert_dtype=expert_dtype)
