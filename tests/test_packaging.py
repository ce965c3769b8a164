"""The package as others get it: an ordinary installation, away from this repository."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the package by itself into a folder, from a copy of the sources."""
    target = tmp_path_factory.mktemp("installed")
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", "duomoe", "kernels", "models"):
        subprocess.run(["cp", "-r", ROOT / name, source], check=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, source]
    subprocess.run(pip, check=True)
    return target


def run(installed: Path, *args: str) -> str:
    # -P keeps the current folder off the path; PYTHONPATH comes before any editable installation.
    environment = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-P", *args]
    return subprocess.run(command, cwd=installed, env=environment, capture_output=True, text=True, check=True).stdout


def test_subpackages_import_from_a_wheel(installed: Path) -> None:
    program = "import duomoe, duomoe.kernels, duomoe.models as m; print(duomoe.kernels.__file__, m.__file__)"
    kernels, models = run(installed, "-c", program).split()
    assert kernels == str(installed / "duomoe" / "kernels" / "__init__.py")
    assert models == str(installed / "duomoe" / "models" / "__init__.py")
    assert sorted(path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")) == ["duomoe"]
    assert (installed / "duomoe" / "py.typed").exists()


def test_the_embedded_model_comes_along(installed: Path) -> None:
    assert run(installed, "-m", "duomoe.generate", "--prompt", "The sea", "--max-new-tokens", "4").strip()


def test_subpackages_import_from_the_editable_installation() -> None:
    program = "import duomoe.kernels, duomoe.models; print(duomoe.kernels.__file__)"
    command = [sys.executable, "-P", "-c", program]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert found == str(ROOT / "kernels" / "__init__.py")
