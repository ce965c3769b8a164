"""A decode step: never waits for the host, and gives the same as a graph, padded, and in any batch."""

from collections.abc import Callable
from itertools import count, zip_longest
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from duomoe import LLM, SamplingParams

DATA_DEPENDENT = ("_local_scalar_dense", "nonzero", "unique", "_unique", "masked_select", "item", "equal")
ASKING = {"min_p": 0.1, "presence_penalty": 0.5, "logit_bias": {3: 1.0}, "logprobs": 2}  # for all that sampling does


class Guard(TorchDispatchMode):
    """Fails on whatever has a result, or a result of a shape, that the host learns from data."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        assert not name.startswith(DATA_DEPENDENT), f"{func.name()} in a decode step"
        if name == "index":
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "a boolean mask in a decode step"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", ["resident", "lru", "duo", "on_demand"])
@pytest.mark.parametrize("asked", [{}, {"temperature": 0.8}, {"temperature": 0.8} | ASKING])
def test_what_a_decode_step_launches_depends_on_no_data(
    policy: str,
    asked: dict[str, Any],
    tiny: Callable[..., Any],
    prompt_of: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bounded = {} if policy == "resident" else {"expert_memory": "100KB"}
    llm = LLM(tiny("qwen3_moe").path, device="cpu", policy=policy, **bounded)
    guarded: list[str] = []
    for name in ("_forward", "_sample"):
        guard(llm, name, guarded, monkeypatch)
    params = SamplingParams(max_new_tokens=6, seed=1, **asked)
    if policy == "on_demand":  # the guard would notice
        with pytest.raises(AssertionError, match="in a decode step"):
            llm.generate(prompt_of(10), params)
    else:
        llm.generate([prompt_of(10), prompt_of(3)], params)
        assert guarded.count("_forward") == 5 and guarded.count("_sample") == 6  # the first behind the prefill


def guard(llm: LLM, name: str, guarded: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    original = getattr(llm.engine.decode_step, name)

    def run(*args: Any) -> Any:
        guarded.append(name)
        with Guard():
            return original(*args)

    monkeypatch.setattr(llm.engine.decode_step, name, run)


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("policy", ["resident", "lru", "duo"])
@pytest.mark.parametrize("asked", [{}, {"temperature": 0.8}, {"temperature": 0.8} | ASKING])
def test_launching_a_step_waits_for_nothing_on_a_gpu(
    policy: str,
    asked: dict[str, Any],
    graph: bool,
    tiny: Callable[..., Any],
    prompt_of: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CUDA itself says where the host would wait."""
    bounded = {} if policy == "resident" else {"expert_memory": "100KB"}
    llm = LLM(tiny("qwen3_moe").path, device="cuda", policy=policy, graph=graph, **bounded)
    step, launched = llm.engine.decode_step, []
    launch = step.launch

    def without_waiting(requests: Any) -> None:
        launched.append(len(requests))
        torch.cuda.set_sync_debug_mode("error")
        try:
            launch(requests)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(step, "launch", without_waiting)
    llm.generate([prompt_of(10), prompt_of(3)], SamplingParams(max_new_tokens=6, seed=1, **asked))
    assert launched == [2] * 5


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
            assert llm.engine.decode_step._forwards and llm.engine.decode_step._samplings
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
    assert llm.engine.decode_step._forwards and llm.engine.decode_step._samplings
    assert llm.policy.traffic_so_far().prefetched_bytes > 0
