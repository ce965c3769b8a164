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


def outputs(installed: Path, *args: str) -> tuple[str, str]:
    """What Python writes to stdout and stderr with the installed package."""
    # -P keeps the current folder off the path; PYTHONPATH comes before any editable installation.
    environment = os.environ | {"PYTHONPATH": str(installed)}
    environment.pop("TRITON_INTERPRET", None)  # Triton's interpreter is for the tests of kernels
    command = [sys.executable, "-P", *args]
    done = subprocess.run(command, cwd=installed, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def run(installed: Path, *args: str) -> str:
    return outputs(installed, *args)[0]


def test_subpackages_import_from_a_wheel(installed: Path) -> None:
    program = "import duomoe, duomoe.kernels, duomoe.models as m; print(duomoe.kernels.__file__, m.__file__)"
    kernels, models = run(installed, "-c", program).split()
    assert kernels == str(installed / "duomoe" / "kernels" / "__init__.py")
    assert models == str(installed / "duomoe" / "models" / "__init__.py")
    assert sorted(path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")) == ["duomoe"]
    assert (installed / "duomoe" / "py.typed").exists()


def test_the_embedded_model_comes_along(installed: Path) -> None:
    assert run(installed, "-m", "duomoe.generate", "--prompt", "The sea", "--max-new-tokens", "4").strip()


# Stands in for an environment with the core dependencies alone: all else that the tests install cannot be imported.
LEAN = """
import runpy, sys
for name in ("numpy", "transformers", "jinja2", "psutil", "hypothesis", "pytest", "compressed_tensors", "yaml"):
    sys.modules[name] = None
sys.argv = ["generate", "--prompt", "The sea", "--max-new-tokens", "4"]
runpy.run_module("duomoe.generate", run_name="__main__", alter_sys=True)
"""


def test_with_core_dependencies_alone_nothing_is_printed_but_text_and_summary(installed: Path) -> None:
    text, said = outputs(installed, "-c", LEAN)
    assert len(text.splitlines()) == 1
    assert len(said.splitlines()) == 1, said
    assert said.startswith("duomoe: 2 + 4 tokens, TTFT")


@pytest.mark.parametrize(
    ("program", "absent"),
    [
        ("import duomoe", "torch triton tqdm"),
        ("import runpy; runpy.run_module('duomoe.generate', run_name='__main__')", "torch triton"),
        ("import runpy; runpy.run_module('duomoe.serve', run_name='__main__')", "torch triton starlette uvicorn"),
        ("from duomoe.server import app, process; assert app.PAGE.is_file()", "torch triton jinja2"),
        ("from duomoe import LLM", "torch._dynamo torch._inductor"),
        ("from duomoe import LLM; LLM(); import torch; assert not torch.cuda.is_initialized()", "torch._dynamo"),
    ],
    ids=["import", "help", "help of serve", "the server's own modules", "import of LLM", "LLM on a CPU"],
)
def test_nothing_is_imported_before_it_is_needed(installed: Path, program: str, absent: str) -> None:
    begin = "import sys, atexit; sys.argv = ['generate', '--help']; "
    check = f"atexit.register(lambda: print('LOADED', [name for name in {absent.split()} if name in sys.modules])); "
    assert run(installed, "-c", begin + check + program).splitlines()[-1] == "LOADED []"


def test_subpackages_import_from_the_editable_installation() -> None:
    program = "import duomoe.kernels, duomoe.models; print(duomoe.kernels.__file__)"
    command = [sys.executable, "-P", "-c", program]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert found == str(ROOT / "kernels" / "__init__.py")
