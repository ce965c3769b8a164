"""Files that are written: nothing else is destroyed, and nothing is left behind."""

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from duomoe import InputError, train_predictor
from duomoe import trace as trace_command
from duomoe.experts import tensor_file
from duomoe.experts.tensor_file import save_tensors
from duomoe.output_file import output_target, replaced

TENSORS = {"x": torch.arange(5)}


def refused(path: Path, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        save_tensors(path, TENSORS, {})
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words)


def test_what_is_no_regular_file_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link to fifo").symlink_to(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("fifo", "link to fifo", "loop", "."):
        refused(tmp_path / name, "special file" if name != "loop" else "loop")
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)
    refused(Path("/dev/null"), "special file")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_a_file_is_written_through_links_also_dangling_ones(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for target in ("there/old", "there/new"):
        (tmp_path / "there" / "old").write_text("old")
        link = tmp_path / "link"
        link.symlink_to(target)
        save_tensors(link, TENSORS, {})
        assert link.is_symlink() and (tmp_path / target).read_bytes()[:1] != b"o"
        link.unlink()
    assert sorted(each.name for each in (tmp_path / "there").iterdir()) == ["new", "old"]


@pytest.mark.parametrize("name", ["x" * 240 + "y" * 15, "x" * 5000, "no/such/folder", "a\0b", "\ud800", ""])
def test_names_that_no_file_can_have(name: str, tmp_path: Path) -> None:
    refused(Path(f"{tmp_path}/{name}"), "")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    refused(tmp_path / "x", "permission")


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError])
def test_an_interrupted_write_leaves_what_was_there(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_text("old")

    def half(tensors: object, file: Path, metadata: object) -> None:
        file.write_bytes(b"half")
        raise error

    monkeypatch.setattr(tensor_file, "save_file", half)
    with pytest.raises(InputError if error is OSError else error):
        save_tensors(tmp_path / "x", TENSORS, {})
    assert [each.name for each in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_text() == "old"


def test_a_file_appears_whole(tmp_path: Path) -> None:
    with replaced(tmp_path / "x") as file:
        file.write_text("new")
        assert not (tmp_path / "x").exists()
    assert (tmp_path / "x").read_text() == "new"
    assert output_target(tmp_path / "x", "--out") == tmp_path / "x"


@pytest.mark.parametrize("out", [".", "fifo", "no/where"])
def test_out_is_checked_before_the_work(
    out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is loaded: a model that is not there would be complained about otherwise."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "prompts").write_text("Hello")
    path = ["--out", str(tmp_path / out), "--model", str(tmp_path / "none")]
    assert trace_command.main(["--prompts", str(tmp_path / "prompts"), *path]) == 2
    assert "--out" in capsys.readouterr().err
    assert train_predictor.main(["--trace", "none", "--kind", "gate", *path]) == 2
    assert "--out" in capsys.readouterr().err


def test_a_model_without_experts_has_nothing_to_trace(
    tiny: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny("qwen3_moe", mlp_only_layers=[0, 1, 2])
    (tmp_path / "prompts").write_text("Hello")
    args = ["--model", str(model.path), "--prompts", str(tmp_path / "prompts"), "--out", str(tmp_path / "out")]
    assert trace_command.main(args) == 2
    assert "no layer of this model has experts" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
