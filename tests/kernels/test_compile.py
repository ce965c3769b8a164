"""The compile gate: every configuration that a launcher can choose, for every GPU generation, without a GPU.

The interpreter shows that a kernel computes the right thing; this shows that the GPU's compiler takes it, without
register spills, within shared memory, and with the instructions that make it fast.
"""

import importlib
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import product
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from duomoe.kernels.configuration import Configuration, shared_memory

CAPABILITIES = [80, 86, 89, 90, 100, 120]
DTYPES = [torch.bfloat16, torch.float16]
WITHOUT_DTYPE = ["admit", "fetch", "pack", "permute"]
MODULES = [
    "activations",
    "attention",
    "combine",
    "expand",
    "expert_gemv",
    "grouped_gemm",
    "rms_norm",
    "rope",
    "router",
    *WITHOUT_DTYPE,
]
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def source(configuration: Configuration, ones: bool = False) -> ASTSource:
    """What a launch would compile, from the types alone; `ones` for a launch where every integer is 1."""
    kernel, types, options = configuration.kernel, configuration.signature, configuration.options
    assert set(types) | {name for name in options if name.isupper()} <= set(kernel.arg_names)
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if ones and types.get(name, "").startswith("i"):
            signature[name], constants[name] = "constexpr", 1
        elif name in types:
            signature[name], _, divisor = types[name].partition(":")
            if divisor:
                attributes[(index,)] = [["tt.divisibility", int(divisor)]]
        else:
            signature[name], constants[name] = "constexpr", options.get(name)
    return ASTSource(kernel, signature, constants, attributes)


def dump(what: str, cubin: str) -> str:
    return subprocess.run([CUOBJDUMP, what, cubin], capture_output=True, text=True, check=True).stdout


def problems(configuration: Configuration, capability: int) -> list[str]:
    """Compile one configuration and list what is wrong with the result."""
    settings = {name: value for name, value in configuration.options.items() if not name.isupper()}
    compiled = triton.compile(source(configuration), target=GPUTarget("cuda", capability, 32), options=settings)
    ptx, found = compiled.asm["ptx"], []
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        Path(cubin.name).write_bytes(compiled.asm["cubin"])
        usage = dump("-res-usage", cubin.name)
        sizes = [int(size) for size in re.findall(r"\b(?:STACK|LOCAL):(\d+)", usage)]
        # For Blackwell, the compiler at times sets up a stack that nothing uses: only a load or store there is a spill.
        if len(sizes) < 2 or (any(sizes) and re.search(r"\b(LDL|STL)\b", dump("-sass", cubin.name))):
            found.append(f"spills registers: {usage.strip()}")
    if compiled.metadata.shared > shared_memory(capability):
        found.append(f"needs {compiled.metadata.shared} bytes of shared memory")
    if configuration.tensor_cores and not re.search(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", ptx):
        found.append("does not use tensor cores")
    if configuration.wide_loads:
        options = configuration.options
        wide = re.findall(r"cp\.async\.cg\.|ld\.global\S*\.v4\.b32", ptx)  # A copy by .cg has 16 bytes.
        plain = options.get("FORMAT", "plain") == "plain"
        size = options["CHUNK"] if "CHUNK" in options else options["BLOCK_N"] * options["BLOCK_K"] * (2 if plain else 1)
        if len(wide) < max(1, size // 16 // (32 * options["num_warps"])) or (plain and "cp.async.ca" in ptx):
            found.append("does not load its weights 16 bytes at a time")
    return found


def check(module: str, dtype: torch.dtype, capability: int) -> list[str]:
    """Compile a kernel file's configurations, in a worker process."""
    found = []
    for configuration in importlib.import_module(f"duomoe.kernels.{module}").configurations(dtype, capability):
        for problem in problems(configuration, capability):
            found.append(f"{configuration.kernel.__name__} {configuration.options}: {problem}")
    return found


def check_ones(module: str, capability: int) -> None:
    """Compile each kernel once as for integers of 1, which Triton makes constants: plain ints that have no methods."""
    every = importlib.import_module(f"duomoe.kernels.{module}").configurations(torch.bfloat16, capability)
    for configuration in {configuration.kernel: configuration for configuration in every}.values():
        triton.compile(source(configuration, ones=True), target=GPUTarget("cuda", capability, 32))


Results = dict[tuple[str, torch.dtype, int], Future[list[str]]]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessPoolExecutor]:
    """Two processes of their own, where Triton compiles and does not interpret."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
            yield pool


@pytest.fixture(scope="module")
def results(pool: ProcessPoolExecutor) -> Results:
    """Everything, submitted at once; the long ones first, so that both processes end together."""
    cases = sorted(product(MODULES, DTYPES, CAPABILITIES), key=lambda case: case[0] != "grouped_gemm")
    once = [case for case in cases if case[0] not in WITHOUT_DTYPE or case[1] is DTYPES[0]]
    return {case: pool.submit(check, *case) for case in once}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("module", MODULES)
def test_compiles_well(results: Results, module: str, capability: int) -> None:
    cases = [results[module, dtype, capability] for dtype in DTYPES if (module, dtype, capability) in results]
    assert cases
    assert [problem for case in cases for problem in case.result()] == []


@pytest.mark.parametrize("module", MODULES)
def test_compiles_where_integers_are_one(pool: ProcessPoolExecutor, module: str) -> None:
    pool.submit(check_ones, module, 90).result()
