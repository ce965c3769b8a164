"""Models by the names that people have for them: folders, hub caches, repositories."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from duomoe import InputError
from duomoe.model_folder import ModelFolder
from duomoe.model_path import find_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache as its own tools make it: files are links to blobs."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--some-one--tiny.model"
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(tiny("mixtral").path.iterdir())):
        shutil.copy(file, repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    return repository


def test_a_cache_folder_and_a_repository_are_its_current_snapshot(cache: Path) -> None:
    (cache / "snapshots" / "another").mkdir()
    for name in (cache, str(cache), "some-one/tiny.model"):
        assert find_model(name) == cache / "snapshots" / COMMIT
        assert ModelFolder(name).config.family == "mixtral"


def test_without_a_current_one_the_only_snapshot_is_meant(cache: Path) -> None:
    (cache / "refs" / "main").unlink()
    assert find_model(cache) == cache / "snapshots" / COMMIT
    (cache / "snapshots" / "another").mkdir()
    with pytest.raises(InputError, match="has 2 snapshots"):
        find_model(cache)


@pytest.mark.parametrize("content", ["../../../..", "", "\0", "x" * 300, "\udcff"])
def test_a_reference_that_is_none_is_passed_over(cache: Path, content: str) -> None:
    (cache / "refs" / "main").write_bytes(content.encode("utf-8", "surrogateescape"))
    try:
        assert find_model(cache) == cache / "snapshots" / COMMIT
    except InputError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("variable", "below"),
    [
        ("HF_HUB_CACHE", ""),
        ("HF_HOME", "hub"),
        ("XDG_CACHE_HOME", "huggingface/hub"),
        ("HOME", ".cache/huggingface/hub"),
    ],
)
def test_the_cache_is_where_its_tools_look_for_it(
    variable: str, below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    folder = tmp_path / below / "models--a--b" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    assert find_model("a/b") == folder


def test_what_is_not_here_is_said_how_to_get(cache: Path) -> None:
    with pytest.raises(InputError, match=r"hf download some-one/other$"):
        find_model("some-one/other")
    with pytest.raises(InputError, match="no such folder"):
        find_model("/nowhere/at/all")


def test_a_file_that_is_still_being_downloaded_is_named(cache: Path) -> None:
    (cache / "snapshots" / COMMIT / "model.safetensors").unlink()
    (cache / "blobs" / "abc.incomplete").write_bytes(b"")
    with pytest.raises(InputError, match=r"abc\.incomplete is not yet downloaded"):
        ModelFolder(cache)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_pointer_of_git_lfs_is_named_as_such(file: str, tiny: Callable[..., Any], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("mixtral").path, tmp_path / "model"))
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123\n"
    (folder / file).write_text(pointer)
    with pytest.raises(InputError, match="Git-LFS pointer"):
        ModelFolder(folder)
