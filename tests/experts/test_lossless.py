"""Which experts are resident, and when, never changes a result: every policy and budget, bit for bit."""

import random
import time
from collections import deque
from collections.abc import Callable
from itertools import cycle
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from duomoe import LLM, SamplingParams
from duomoe.experts.decode import Decode
from duomoe.experts.link import Copy, HostLink, LinkError, Pace
from duomoe.experts.payoff import Payoff
from duomoe.experts.policies import BOUNDED
from duomoe.experts.policies.cached import CachedPolicy
from duomoe.experts.predictor import Predictor

POISON = 0xFF  # bytes that are NaN in every float type


def row_bytes(llm: LLM) -> int:
    return llm.memory["expert_slots_bytes"] // (len(llm.config.moe_layers) * llm.config.num_experts)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize("policy", BOUNDED)
def test_every_number_of_slots_gives_the_same_bits(
    policy: str, family: str, dtype: str, device: str, tiny: Callable[..., Any], prompt_of: Callable[..., list[int]]
) -> None:
    path = tiny(family).path
    whole = LLM(path, device=device, dtype=dtype, compile="off")
    prompt, batch = prompt_of(50), [prompt_of(length, seed=length) for length in (1, 16, 33)]
    logits = whole.logits(prompt)
    tokens = [completion.token_ids for completion in whole.generate(batch, SamplingParams(max_new_tokens=8))]
    for slots in [*range(1, whole.config.num_experts + 1), 3 * whole.config.num_experts]:
        memory = slots * row_bytes(whole)
        bounded = LLM(path, device=device, dtype=dtype, policy=policy, expert_memory=memory, compile="off")
        assert torch.equal(bounded.logits(prompt), logits)
        found = bounded.generate(batch, SamplingParams(max_new_tokens=8))
        assert [completion.token_ids for completion in found] == tokens
        assert torch.equal(bounded.logits(prompt), logits)  # from whatever the generation has left in the slots


@pytest.mark.gpu
@pytest.mark.parametrize("policy", BOUNDED)
def test_memory_that_cannot_be_pinned_gives_the_same_bits(
    policy: str, tiny: Callable[..., Any], prompt_of: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny("qwen3_moe").path
    whole = LLM(path, device="cuda", compile="off")
    monkeypatch.setattr("duomoe.experts.store.pin", lambda rows: False)
    bounded = LLM(path, device="cuda", policy=policy, expert_memory=5 * row_bytes(whole), compile="off")
    batch, params = [prompt_of(length, seed=length) for length in (1, 16, 33)], SamplingParams(max_new_tokens=8)
    found, expected = bounded.generate(batch, params), whole.generate(batch, params)
    assert [completion.token_ids for completion in found] == [completion.token_ids for completion in expected]


@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_prompts_and_any_budget(data: st.DataObject, tiny: Callable[..., Any]) -> None:
    path = tiny("qwen3_moe").path
    whole = LLM(path, device="cpu")
    memory = row_bytes(whole) * data.draw(st.integers(1, 24))
    bounded = LLM(path, device="cpu", policy=data.draw(st.sampled_from([*BOUNDED])), expert_memory=memory)
    tokens = st.lists(st.integers(0, 210), min_size=1, max_size=70)
    for _ in range(data.draw(st.integers(1, 3))):
        prompts = data.draw(st.lists(tokens, min_size=1, max_size=4))
        params = SamplingParams(max_new_tokens=5, temperature=data.draw(st.sampled_from([0.0, 1.0])), seed=7)
        expected = [completion.token_ids for completion in whole.generate(prompts, params)]
        assert [completion.token_ids for completion in bounded.generate(prompts, params)] == expected


class Adversary(HostLink):
    """Poisons a slot the moment it is given away, brings its new expert late, and may fail."""

    def __init__(self) -> None:
        super().__init__()
        self.random = random.Random(0)
        self.fail_in = -1  # copies until one fails
        self.known: set[Copy] = set()

    def _queue(self, copy: Copy, queue: deque[Copy]) -> Copy:
        if copy not in self.known:  # a copy may be queued again, when a part of it is there
            self.known.add(copy)
            copy.slot.fill_(POISON)
        return super()._queue(copy, queue)

    def _move(self, copy: Copy, size: int) -> None:
        time.sleep(self.random.choice([0, 0, 0.001]))
        self.fail_in -= 1
        if self.fail_in == 0:
            raise OSError("the bus fell off")
        super()._move(copy, size)


def connect(llm: LLM, link: HostLink) -> None:
    """Let all copies of a policy go over that link."""
    llm.policy.lease.link.close()
    llm.policy.lease.link = link
    if isinstance(llm.policy, CachedPolicy):
        llm.policy.decoder.fetcher.link = link


@pytest.mark.parametrize("policy", BOUNDED)
@pytest.mark.parametrize("slots", [1, 2, 5, 11, 24])
def test_no_stale_weight_is_ever_read(
    policy: str, slots: int, tiny: Callable[..., Any], prompt_of: Callable[..., list[int]]
) -> None:
    path = tiny("qwen2_moe").path
    whole = LLM(path, device="cpu")
    llm = LLM(path, device="cpu", policy=policy, expert_memory=slots * row_bytes(whole))
    connect(llm, link := Adversary())
    params = SamplingParams(max_new_tokens=6)
    for prompt in map(prompt_of, (40, 3, 1, 25)):
        assert torch.equal(llm.logits(prompt), whole.logits(prompt))
        assert llm.generate(prompt, params)[0].token_ids == whole.generate(prompt, params)[0].token_ids
    link.close()


@pytest.mark.parametrize("policy", BOUNDED)
@pytest.mark.parametrize("fail_in", [1, 4, 9, 30])
def test_a_failed_copy_is_an_error_where_it_is_needed_and_harms_nobody_else(
    policy: str, fail_in: int, tiny: Callable[..., Any], prompt_of: Callable[..., list[int]]
) -> None:
    path = tiny("mixtral").path
    whole = LLM(path, device="cpu")
    llm = LLM(path, device="cpu", policy=policy, expert_memory=6 * row_bytes(whole))
    connect(llm, link := Adversary())
    params = SamplingParams(max_new_tokens=30)
    expected = whole.generate(prompt_of(20), params)[0].token_ids
    link.fail_in = fail_in
    if fail_in == 1 and policy in ("on_demand", "moe_infinity"):  # which need the first one that they send
        with pytest.raises(LinkError, match="the bus fell off"):
            llm.generate(prompt_of(20), params)
    else:  # one that was sent ahead may be needed later, or by nobody
        try:
            assert llm.generate(prompt_of(20), params)[0].token_ids == expected
        except LinkError as error:
            assert "the bus fell off" in str(error)
    assert link.fail_in <= 0
    assert llm.engine.cache.pages.used == 0
    assert llm.generate(prompt_of(20), params)[0].token_ids == expected
    link.close()


class Counter(HostLink):
    """Remembers which rows were sent."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[int] = []

    def _queue(self, copy: Copy, queue: deque[Copy]) -> Copy:
        self.sent.append(copy.source.data_ptr())
        return super()._queue(copy, queue)


@pytest.mark.parametrize("slots", [1, 2, 3, 7, 16, 23])
@pytest.mark.parametrize("lengths", [[200], [2], [17], [60, 3, 120, 1]])
def test_in_one_prefill_no_expert_crosses_twice(
    lengths: list[int], slots: int, tiny: Callable[..., Any], prompt_of: Callable[..., list[int]]
) -> None:
    path = tiny("qwen3_moe").path
    llm = LLM(path, device="cpu", policy="lru", expert_memory=slots * row_bytes(LLM(path, device="cpu")))
    connect(llm, link := Counter())
    for seed in range(3):
        prompts = [prompt_of(length, seed=seed + length) for length in lengths]
        link.sent.clear()
        before = llm.policy.traffic_so_far()
        llm.generate(prompts, SamplingParams(max_new_tokens=1))
        assert len(set(link.sent)) == len(link.sent)
        moved = llm.policy.traffic_so_far().since(before)
        assert moved.link_bytes == moved.streamed_bytes == len(link.sent) * llm.policy.lease.pool.rows.shape[1]
    link.close()


@pytest.mark.parametrize("slots", [9, 16, 23])
def test_a_prefill_copies_nothing_that_the_last_one_left_in_the_slots(
    slots: int, tiny: Callable[..., Any], prompt_of: Callable[..., list[int]]
) -> None:
    path = tiny("qwen3_moe").path
    llm = LLM(path, device="cpu", policy="lru", expert_memory=slots * row_bytes(LLM(path, device="cpu")))
    for seed in (0, 2):
        llm.generate(prompt_of(200, seed=seed), SamplingParams(max_new_tokens=1))
    owners = [divmod(owner, 8) for owner in llm.policy.directory.owner_of.tolist() if owner >= 0]
    kept = {llm.policy.lease.store.layers[layer][expert].data_ptr() for layer, expert in owners}
    connect(llm, link := Counter())
    llm.generate(prompt_of(200, seed=1), SamplingParams(max_new_tokens=1))
    assert len(kept) >= slots - 1
    # Each layer's best experts are safe; what else was there may have made room for the stream.
    assert len(set(link.sent) & kept) <= slots - 3 * ((slots - llm.policy.stream.ring) // 3)
    assert len(link.sent) < 24
    link.close()


def test_on_demand_moves_what_was_routed_and_nothing_else(
    tiny: Callable[..., Any], prompt_of: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(tiny("mixtral").path, device="cpu", policy="on_demand", expert_memory="100KB")
    routed = []
    experts = llm.policy.experts

    def spy(index: int, total: Any, inputs: Any, routings: Any) -> Any:
        routed.append(len(set(routings[0].experts.flatten().tolist())))
        return experts(index, total, inputs, routings)

    monkeypatch.setattr(llm.policy, "experts", spy)
    traffic = llm.generate(prompt_of(30), SamplingParams(max_new_tokens=4))[0].metrics.experts
    assert traffic.misses == sum(routed) and traffic.hits == 0
    assert traffic.demand_bytes == sum(routed) * llm.policy.lease.pool.rows.shape[1] == traffic.link_bytes


class Wrong(Predictor):
    """Is certain of experts drawn at random, also of some that no layer has room for."""

    def __init__(self, llm: LLM) -> None:
        config = llm.config
        layers = len(config.moe_layers)
        super().__init__(llm.engine.model, torch.ones(3, layers, config.num_experts))
        self.random = torch.Generator().manual_seed(0)
        self.asked = 0

    @classmethod
    def of_tensors(cls, model: Any, tensors: Any) -> "Wrong":
        raise NotImplementedError

    def predict(self, index: int, h: torch.Tensor, routing: Any) -> list[torch.Tensor]:
        self.asked += 1
        shape = (min(3, self.layers - 1 - index), len(h), self.num_experts)
        return list(torch.rand(shape, generator=self.random).argsort(-1).to(torch.int32))


@pytest.mark.parametrize("slots", [1, 2, 3, 7, 12, 23])
@pytest.mark.parametrize("link", [HostLink, Adversary, lambda: HostLink(Pace(bandwidth=2e7, latency=1e-5))])
def test_no_predictor_changes_a_result(
    link: Callable[[], HostLink],
    slots: int,
    tiny: Callable[..., Any],
    prompt_of: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tiny("qwen3_moe").path
    whole = LLM(path, device="cpu")
    llm = LLM(path, device="cpu", policy="duo", expert_memory=slots * row_bytes(whole))
    monkeypatch.setattr("duomoe.experts.decode.SENT_AHEAD", 3)
    policy = llm.policy
    policy.decoder = Decode(
        policy.directory, policy.lease.pool, policy.decoder.free, policy.decoder.fetcher, True, Wrong(llm)
    )
    connect(llm, other := link())
    params = SamplingParams(max_new_tokens=12, temperature=0.7, seed=3)
    for lengths in ((20,), (3, 17, 1), (1,)):
        prompts = [prompt_of(length, seed=length) for length in lengths]
        found = llm.generate(prompts, params)
        assert [c.token_ids for c in found] == [c.token_ids for c in whole.generate(prompts, params)]
    traffic = policy.traffic_so_far()
    assert traffic.prefetched_bytes > 0 and traffic.prefetch_used_bytes <= traffic.prefetched_bytes
    other.close()


class Told(Payoff):
    """Says what it was told, step after step, and then all over."""

    def __init__(self, *settings: bool) -> None:
        super().__init__()
        self.settings = cycle(settings)
        self.pays = next(self.settings)

    def note(self, sequences: int, seconds: float) -> None:
        self.pays = next(self.settings)


@pytest.mark.parametrize("slots", [1, 3, 12, 23])
@pytest.mark.parametrize("settings", [(True,), (False,), (True, True, False), (False, False, True)])
def test_looking_ahead_or_not_changes_no_result(
    settings: tuple[bool, ...], slots: int, tiny: Callable[..., Any], prompt_of: Callable[..., list[int]]
) -> None:
    path = tiny("qwen3_moe").path
    whole = LLM(path, device="cpu")
    llm = LLM(path, device="cpu", policy="duo", expert_memory=slots * row_bytes(whole))
    policy = llm.policy
    policy.decoder = Decode(
        policy.directory, policy.lease.pool, policy.decoder.free, policy.decoder.fetcher, True, wrong := Wrong(llm)
    )
    policy.decoder.payoff = Told(*settings)
    connect(llm, link := Adversary())
    params = SamplingParams(max_new_tokens=12)
    for lengths in ((20,), (3, 17)):
        prompts = [prompt_of(length, seed=length) for length in lengths]
        found = llm.generate(prompts, params)
        assert [c.token_ids for c in found] == [c.token_ids for c in whole.generate(prompts, params)]
    traffic = policy.traffic_so_far()
    assert (wrong.asked > 0) == any(settings)
    assert (traffic.prefetched_bytes > 0) == any(settings)
    assert traffic.prefetch_used_bytes <= traffic.prefetched_bytes
    link.close()


def test_steps_that_looking_ahead_makes_slower_are_followed_by_steps_without(
    tiny: Callable[..., Any], prompt_of: Callable[..., list[int]]
) -> None:
    llm = LLM(tiny("qwen3_moe").path, device="cpu", policy="duo", expert_memory="50%")
    decoder = llm.policy.decoder
    for _ in range(24):
        decoder.note_step(1, 2.0 if decoder.payoff.pays else 1.0)
    assert decoder.sending.tolist() == [0]
    found = llm.generate(prompt_of(9), SamplingParams(max_new_tokens=8))[0].metrics.experts
    assert found.prefetched_bytes == 0 and found.hits + found.misses > 0


@pytest.mark.parametrize("predictor", [None, "gate", "none"])
def test_every_predictor_of_the_embedded_model_gives_the_same_text(predictor: str | None) -> None:
    params = SamplingParams(max_new_tokens=8)
    whole = LLM(device="cpu").generate("The sea", params)[0]
    llm = LLM(device="cpu", policy="duo", expert_memory="15%", predictor=predictor)
    found = llm.generate("The sea", params)[0]
    assert found.token_ids == whole.token_ids
    assert (found.metrics.experts.prefetched_bytes > 0) == (predictor != "none")
