"""Where a model's folder is: as it is named, within a hub cache's folder, or by the name of its repository."""

import os
import re
from pathlib import Path

from duomoe.errors import InputError

REPOSITORY = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)


def find_model(path: str | os.PathLike[str]) -> Path:
    """Return the folder with config.json that is meant.

    Args:
        path: a model's folder, a hub cache's folder of a repository (models--owner--name), or owner/name.

    Raises:
        InputError: when nothing of that name is here.
    """
    name = os.fspath(path)
    if os.path.isdir(name):
        return _snapshot(Path(name))
    if REPOSITORY.fullmatch(name) and not name.startswith((".", "/")):
        cached = _hub_cache() / f"models--{name.replace('/', '--')}"
        if os.path.isdir(cached):
            return _snapshot(cached)
        raise InputError(
            f"{name}: no such folder, nor a model of that name in the hub's cache; to download it: hf download {name}"
        )
    raise InputError(f"{name}: no such folder; a model is a folder with config.json and safetensors files")


def _hub_cache() -> Path:
    """Return where the hub's own tools keep what they download, by the variables that they know."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or str(Path(base) / "huggingface")
    return Path(home).expanduser() / "hub"


def _snapshot(folder: Path) -> Path:
    """Return the snapshot of a hub cache's folder that is current; any other folder as it is."""
    snapshots = folder / "snapshots"
    if os.path.isfile(folder / "config.json") or not os.path.isdir(snapshots):
        return folder
    try:
        current = folder / "refs" / "main"
        if os.path.isfile(current):
            commit = current.read_text("ascii").strip()
            if re.fullmatch(r"[0-9a-zA-Z._-]{1,100}", commit) and os.path.isdir(snapshots / commit):
                return snapshots / commit
        found = sorted(each for each in snapshots.iterdir() if os.path.isdir(each))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: cannot be read: {error}") from None
    if len(found) != 1:
        raise InputError(f"{snapshots}: has {len(found)} snapshots, and none is said to be current; name one")
    return found[0]


def unfinished(folder: Path) -> str:
    """Return what is to be added to a complaint that a file is missing, where one is still being downloaded."""
    places = (folder, folder / ".cache" / "huggingface" / "download", folder.parent.parent / "blobs")
    for place in places:
        try:
            found = next(iter(sorted(place.glob("*.incomplete"))), None)
        except OSError:
            continue
        if found is not None:
            return f"; {found} is not yet downloaded, or its download was broken off"
    return ""
