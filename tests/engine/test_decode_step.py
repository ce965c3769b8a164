"""A decode step: never waits for the host, and gives the same as a graph, padded, and in any batch."""

from collections.abc import Callable
from itertools import count, zip_longest
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from duomoe import LLM, SamplingParams

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DATA_DEPENDENT = ("_local_scalar_dense", "nonzero", "unique", "_unique", "masked_select", "item", "equal")


class Guard(TorchDispatchMode):
    """Fails on whatever would make the host wait for the device, or a shape depend on data."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        assert not name.startswith(DATA_DEPENDENT), f"{func.name()} in a decode step"
        if name == "index":
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "a boolean mask in a decode step"
        result = func(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            assert result.device == source.device, "a copy between host and device in a decode step"
        return result


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("policy", ["resident", "lru", "duo", "on_demand"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_decode_step_never_waits_for_the_host(
    policy: str,
    temperature: float,
    device: str,
    tiny: Callable[..., Any],
    prompt_of: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bounded = {} if policy == "resident" else {"expert_memory": "100KB"}
    llm = LLM(tiny("qwen3_moe").path, device=device, policy=policy, compile="off", graph=False, **bounded)
    step, steps = llm.engine.decode_step._step, []

    def guarded(*args: Any) -> torch.Tensor:
        with Guard():
            steps.append(step(*args))
        return steps[-1]

    monkeypatch.setattr(llm.engine.decode_step, "_step", guarded)
    params = SamplingParams(max_new_tokens=6, temperature=temperature, seed=1)
    if policy == "on_demand":  # the guard would notice
        with pytest.raises(AssertionError, match="in a decode step"):
            llm.generate(prompt_of(10), params)
    else:
        llm.generate([prompt_of(10), prompt_of(3)], params)
        assert len(steps) == (5 if device == "cpu" else 7)  # on a GPU those of padding, too, for one and for two


def test_a_policy_learns_how_long_each_decode_step_took(
    tiny: Callable[..., Any], prompt_of: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sequences, which decode together as far as they may; the clock moves on a second whenever it is read."""
    llm = LLM(tiny("qwen3_moe").path, device="cpu", policy="duo", expert_memory="100KB")
    steps: list[tuple[int, float]] = []
    monkeypatch.setattr(llm.policy, "note_step", lambda *step: steps.append(step))
    clock = map(float, count())
    monkeypatch.setattr("duomoe.engine.engine.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    streams = [llm.stream(prompt_of(5), SamplingParams(max_new_tokens=tokens)) for tokens in (3, 5)]
    for _ in zip_longest(*streams):
        pass
    assert sum(sequences for sequences, _ in steps) == 2 + 4 and {seconds for _, seconds in steps} == {1.0}


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["resident", "lru", "duo"])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_graph_gives_what_the_step_gives(
    policy: str, family: str, dtype: str, tiny: Callable[..., Any], prompt_of: Callable[..., list[int]]
) -> None:
    bounded = {} if policy == "resident" else {"expert_memory": "100KB"}
    path = tiny(family).path
    prompts = [prompt_of(length, seed=length) for length in (1, 16, 33, 7, 20)]
    found = []
    for graph in (True, False):
        llm = LLM(path, device="cuda", dtype=dtype, policy=policy, graph=graph, compile="off", **bounded)
        for temperature in (0.0, 0.9):
            params = SamplingParams(max_new_tokens=24, temperature=temperature, seed=5)
            found.append([completion.token_ids for completion in llm.generate(prompts, params)])
        if graph:
            assert any(captured is not None for captured in llm.engine.decode_step._graphs.values())
    assert found[:2] == found[2:]


@pytest.mark.gpu
@pytest.mark.parametrize("share", ["5%", "15%", "50%"])
def test_the_trained_predictor_works_within_a_graph(share: str) -> None:
    prompts = ["def main(", "The expert that is needed next", "#include"]
    params = SamplingParams(max_new_tokens=40)
    whole = LLM(device="cuda", policy="resident", compile="off")
    tokens = [completion.token_ids for completion in whole.generate(prompts, params)]
    llm = LLM(device="cuda", policy="duo", expert_memory=share, compile="off")
    found = llm.generate(prompts, params)
    assert [completion.token_ids for completion in found] == tokens
    assert any(captured is not None for captured in llm.engine.decode_step._graphs.values())
    assert llm.policy.traffic_so_far().prefetched_bytes > 0
