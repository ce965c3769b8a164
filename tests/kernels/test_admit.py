"""Who gets which slot: random steps against a plain model of the rules."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from kernel_cases import DEVICE, generator
from torch import Tensor

from duomoe.kernels.admit import (
    LEASED,
    NOBODY,
    ONE,
    admit,
    admit_ahead,
    admit_ahead_reference,
    admit_ahead_triton,
    admit_reference,
    admit_triton,
)

CPU = torch.device("cpu")


class Rules:
    """The rules, in dictionaries. Slots are numbers; an expert is (layer, expert)."""

    def __init__(self, layers: int, experts: int, slots: int) -> None:
        self.layers, self.experts, self.slots = layers, experts, slots
        self.owner: dict[int, tuple[int, int]] = {}
        self.stamp = dict.fromkeys(range(slots), 0)
        self.use = {(layer, expert): 0 for layer in range(layers) for expert in range(experts)}
        self.unproven: set[int] = set()
        self.leased: set[int] = set()
        self.pending: set[int] = set()
        self.clock = self.hits = self.misses = self.unserved = 0

    def slot(self, expert: tuple[int, int]) -> int | None:
        return next((slot for slot, owner in self.owner.items() if owner == expert), None)

    def flat(self, expert: tuple[int, int]) -> int:
        return expert[0] * self.experts + expert[1]

    def key(self, slot: int, layer: int, predicted: bool, horizon: int) -> int:
        if slot not in self.owner:
            return 2**31 - 1
        if not predicted:
            return self.clock - self.stamp[slot]
        distance = next(d for d in range(1, self.layers + 1) if (layer + d) % self.layers == self.owner[slot][0])
        if slot in self.unproven and distance <= horizon:
            return distance
        return distance + self.layers * (65536 // max(self.use[self.owner[slot]], 1) - 1)

    def victim(self, spared: set[tuple[int, int]], *how: Any) -> int | None:
        here = [slot for slot in self.stamp if slot not in self.leased]
        free = [slot for slot in here if self.stamp[slot] != self.clock and self.owner.get(slot) not in spared]
        return max(free, key=lambda slot: (self.key(slot, *how), -slot), default=None)

    def wave(self, chosen: list[int] | None, width: int, *how: Any) -> tuple[list[list[int]], list[list[int]]]:
        """Admit one wave; return `slots` and `misses`."""
        layer = how[0]
        waited = 0 if chosen is not None else len(self.pending)
        if chosen is not None:
            self.pending = {expert for expert in chosen if expert >= 0}
            for expert in range(self.experts):
                self.use[layer, expert] -= self.use[layer, expert] // 32
                self.use[layer, expert] += 65536 // 32 if expert in self.pending else 0
        self.clock += 1
        found, fetched, entries = {}, {}, []
        for expert in sorted(self.pending):
            if (slot := self.slot((layer, expert))) is None:
                continue
            self.pending.remove(expert)
            self.hits += 1
            self.stamp[slot] = self.clock
            if slot in self.unproven:
                self.unproven.remove(slot)
                fetched[expert] = slot
                entries.append((self.flat((layer, expert)), slot, 1))
            else:
                found[expert] = slot
        for expert in sorted(self.pending):
            if (slot := self.victim(set(), *how)) is None or len(entries) == width:
                break
            self.pending.remove(expert)
            self.misses += 1
            self.owner[slot], self.stamp[slot] = (layer, expert), self.clock
            self.unproven.discard(slot)
            fetched[expert] = slot
            entries.append((self.flat((layer, expert)), slot, 0))
        self.unserved += len(self.pending) - waited
        slots = [[where.get(expert, -1) for expert in range(self.experts)] for where in (found, fetched)]
        return slots, columns(entries, width)

    def look_ahead(self, sending: bool, candidates: list[int], limit: int, *how: Any) -> list[list[int]]:
        """Place candidates; return `ahead`."""
        wanted = [divmod(flat, self.experts) for flat in dict.fromkeys(candidates) if sending and flat >= 0]
        entries = []
        for expert in wanted:
            if (slot := self.slot(expert)) is not None:
                if slot in self.unproven:
                    entries.append((self.flat(expert), slot, 1))
            elif limit > 0 and (slot := self.victim(set(wanted), *how)) is not None:
                limit -= 1
                self.owner[slot], self.stamp[slot] = expert, self.clock
                self.unproven.add(slot)
                entries.append((self.flat(expert), slot, 0))
        return columns(entries, len(candidates))


def columns(entries: list[tuple[int, int, int]], width: int) -> list[list[int]]:
    padded = entries + [(-1, -1, -1)] * (width - len(entries))
    return [list(row) for row in zip(*padded, strict=True)]


class State:
    """The tensors of a directory, in the order in which the operators take them."""

    def __init__(self, layers: int, experts: int, slots: int, device: torch.device) -> None:
        def full(*shape: int, value: int = 0, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        self.slot_of, self.owner_of = full(layers, experts, value=-1), full(slots, value=-1)
        self.last_use, self.unproven = full(slots, dtype=torch.int64), full(slots)
        self.use, self.clock = full(layers, experts), full(1, dtype=torch.int64)
        self.sending = full(1, value=1)
        self.counts, self.issued = full(3, dtype=torch.int64), full(1, value=-9, dtype=torch.int64)
        self.pending, self.slots = full(experts), full(2, experts, value=-9)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.slot_of, self.owner_of, self.last_use, self.unproven, self.use, self.clock

    def place(self, flat: int, slot: int) -> None:
        self.slot_of.view(-1)[flat] = slot
        self.owner_of[slot] = flat


def list_of(width: int, device: torch.device) -> Tensor:
    return torch.full((3, width), -9, dtype=torch.int32, device=device)


class Steps(RuleBasedStateMachine):
    """Steps, further waves and fetches ahead, in any order."""

    admit: Any
    admit_ahead: Any

    @initialize(data=st.data(), layers=st.integers(1, 4), experts=st.integers(1, 6), slots=st.integers(1, 7))
    def start(self, data: st.DataObject, layers: int, experts: int, slots: int) -> None:
        self.rules, self.state = Rules(layers, experts, slots), State(layers, experts, slots, DEVICE)
        for expert in self.rules.use:
            self.rules.use[expert] = data.draw(st.sampled_from([0, 1, 7, 300, 8192, 30000, 65536]))
            self.state.use[expert] = self.rules.use[expert]
        owners = data.draw(st.permutations(sorted(self.rules.use)))
        for slot, owner in zip(range(slots), owners, strict=False):
            if data.draw(st.booleans()):
                self.rules.owner[slot] = owner
                self.state.place(self.rules.flat(owner), slot)
                self.rules.stamp[slot] = data.draw(st.integers(-5, 0))
                self.state.last_use[slot] = self.rules.stamp[slot]
            elif slot > 0 and data.draw(st.booleans()):
                self.rules.leased.add(slot)
                self.state.owner_of[slot] = LEASED
        self.using: dict[int, int] = {}
        self.experts = torch.empty(0)
        self.how: tuple[int, bool, int] = (0, False, 1)

    @rule(data=st.data(), predicted=st.booleans(), horizon=st.integers(1, 3), extra=st.integers(0, 2))
    def step(self, data: st.DataObject, predicted: bool, horizon: int, extra: int) -> None:
        layer = data.draw(st.integers(0, self.rules.layers - 1))
        tokens, top_k = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
        pair = st.integers(-1, self.rules.experts - 1)
        chosen = data.draw(st.lists(pair, min_size=tokens * top_k, max_size=tokens * top_k))
        self.experts = torch.tensor(chosen, dtype=torch.int32, device=DEVICE).view(tokens, top_k)
        self.width = min(self.rules.experts, tokens * top_k, self.rules.slots) + extra
        self.how = (layer, predicted, horizon)
        self.wave(chosen)

    @precondition(lambda self: self.rules.pending)
    @rule()
    def next_wave(self) -> None:
        before = set(self.rules.pending)
        self.wave(None)
        assert self.rules.pending < before  # every wave gets further

    def wave(self, chosen: list[int] | None) -> None:
        slots, misses = self.rules.wave(chosen, self.width, *self.how)
        state, entries, (layer, predicted, horizon) = self.state, list_of(self.width, DEVICE), self.how
        self.admit(
            self.experts,
            layer,
            chosen is not None,
            predicted,
            horizon,
            state.pending,
            *state.tensors(),
            state.counts,
            state.slots,
            entries,
        )
        assert state.slots.tolist() == slots
        assert entries.tolist() == misses
        served = [max(pair) for pair in zip(*slots, strict=True)]
        self.using = {self.rules.flat((layer, expert)): slot for expert, slot in enumerate(served) if slot >= 0}

    @rule(data=st.data(), sending=st.booleans(), limit=st.integers(0, 4), width=st.integers(1, 6))
    def look_ahead(self, data: st.DataObject, sending: bool, limit: int, width: int) -> None:
        every = st.integers(-1, self.rules.layers * self.rules.experts - 1)
        candidates = data.draw(st.lists(every, min_size=width, max_size=width))
        expected = self.rules.look_ahead(sending, candidates, limit, *self.how)
        entries, (layer, predicted, horizon) = list_of(width, DEVICE), self.how
        flat = torch.tensor(candidates, dtype=torch.int32, device=DEVICE)
        state = self.state
        state.sending.fill_(sending)
        self.admit_ahead(flat, layer, limit, predicted, horizon, *state.tensors(), state.sending, entries, state.issued)
        assert entries.tolist() == expected
        assert state.issued.tolist() == [self.rules.clock]

    @invariant()
    def follows_the_rules(self) -> None:
        rules, state = self.rules, self.state
        every = range(rules.slots)
        nobody = [LEASED if slot in rules.leased else NOBODY for slot in every]
        owners = [rules.flat(rules.owner[slot]) if slot in rules.owner else nobody[slot] for slot in every]
        assert state.owner_of.tolist() == owners
        assert state.last_use.tolist() == [rules.stamp[slot] for slot in every]
        assert state.unproven.tolist() == [int(slot in rules.unproven) for slot in every]
        assert state.use.flatten().tolist() == list(rules.use.values())
        assert state.clock.tolist() == [rules.clock]
        assert state.counts.tolist() == [rules.hits, rules.misses, rules.unserved]
        assert state.pending.tolist() == [int(expert in rules.pending) for expert in range(rules.experts)]

    @invariant()
    def slots_and_owners_are_inverse(self) -> None:
        owners = {slot: flat for slot, flat in enumerate(self.state.owner_of.tolist()) if flat >= 0}
        slots = {slot: flat for flat, slot in enumerate(self.state.slot_of.flatten().tolist()) if slot >= 0}
        assert owners == slots

    @invariant()
    def what_the_wave_computes_stays(self) -> None:
        where = self.state.slot_of.flatten().tolist()
        assert all(where[flat] == slot for flat, slot in self.using.items())


class ReferenceSteps(Steps):
    admit, admit_ahead = staticmethod(admit_reference), staticmethod(admit_ahead_reference)


class KernelSteps(Steps):
    admit, admit_ahead = staticmethod(admit_triton), staticmethod(admit_ahead_triton)


TestReference = ReferenceSteps.TestCase
TestReference.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestKernel = KernelSteps.TestCase
TestKernel.settings = settings(
    max_examples=10, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("predicted", [False, True])
@pytest.mark.parametrize(
    ("layers", "experts", "slots", "tokens", "steps"),
    [
        pytest.param(4, 6, 9, 1, 25, id="tiny"),
        pytest.param(20, 60, 1100, 8, 6, id="small"),
        pytest.param(8, 40, 200, 256, 3, id="large-batch"),
        pytest.param(48, 128, 4608, 16, 200, id="qwen3-30b", marks=pytest.mark.gpu),
        pytest.param(94, 128, 12000, 256, 100, id="qwen3-235b", marks=pytest.mark.gpu),
        pytest.param(32, 8, 40, 256, 100, id="mixtral", marks=pytest.mark.gpu),
    ],
)
def test_kernels_match_the_references(
    layers: int, experts: int, slots: int, tokens: int, steps: int, predicted: bool
) -> None:
    """Directories that are full at the start, from a few slots to several blocks, through steps with fetches ahead.

    Choices and candidates are many times as many as the experts among them, of which some come first in later blocks.
    """
    random, top_k, candidates = generator(layers), min(8, experts // 2), 24 * tokens
    ours, theirs = (State(layers, experts, slots, device) for device in (DEVICE, CPU))
    owners = torch.randperm(layers * experts, generator=random)[:slots].to(torch.int32)
    used, use = (torch.randint(high, shape, generator=random) for high, shape in ((99, owners.shape), (ONE, (99,))))
    for state in (ours, theirs):
        state.owner_of[: len(owners)] = owners.to(state.owner_of.device)
        state.slot_of.view(-1)[owners.long()] = torch.arange(len(owners), dtype=torch.int32).to(state.owner_of.device)
        state.last_use[: len(owners)] = used.to(state.owner_of.device)
        state.use.copy_(use[torch.arange(layers * experts) % 99].view(layers, experts))
        state.clock.fill_(100)
    width = min(experts, tokens * top_k, slots)
    for layer in torch.randint(layers, (steps,), generator=random).tolist():
        chosen = torch.rand(tokens, experts, generator=random).argsort(-1)[:, :top_k].sort(0).values.to(torch.int32)
        ahead = torch.rand(candidates, generator=random) * torch.linspace(1, 2 * experts, candidates)
        ahead = ((ahead.int() + (layer + 1) * experts) % (layers * experts)).to(torch.int32)
        limit = 12 if layer % 2 else 3
        for wave in range(2):
            lists = [list_of(width, DEVICE), list_of(width, CPU)]
            rule = (layer, wave == 0, predicted, 2)
            admit_triton(chosen.to(DEVICE), *rule, ours.pending, *ours.tensors(), ours.counts, ours.slots, lists[0])
            admit_reference(chosen, *rule, theirs.pending, *theirs.tensors(), theirs.counts, theirs.slots, lists[1])
            assert torch.equal(lists[0].cpu(), lists[1])
        lists = [list_of(candidates, DEVICE), list_of(candidates, CPU)]
        rule = (layer, limit, predicted, 2)
        admit_ahead_triton(ahead.to(DEVICE), *rule, *ours.tensors(), ours.sending, lists[0], ours.issued)
        admit_ahead_reference(ahead, *rule, *theirs.tensors(), theirs.sending, lists[1], theirs.issued)
        assert torch.equal(lists[0].cpu(), lists[1])
        for name, tensor in vars(theirs).items():
            assert torch.equal(getattr(ours, name).cpu(), tensor), name
    assert int(theirs.counts[0]) > 0 and (slots >= layers * experts or int(theirs.counts[1]) > 0)


@pytest.mark.parametrize(("call", "device"), [(admit_ahead_reference, CPU), (admit_ahead_triton, DEVICE)])
def test_candidates_do_not_push_each_other_out(call: Any, device: torch.device) -> None:
    """Experts 3 and 5 hold the only slots and are candidates themselves, so nobody else gets one."""
    state, entries = State(2, 4, 2, device), list_of(4, device)
    state.place(3, 0)
    state.place(5, 1)
    state.unproven[1] = 1
    state.clock += 1
    candidates = torch.tensor([6, 5, 7, 3], dtype=torch.int32, device=device)
    call(candidates, 0, 4, False, 1, *state.tensors(), state.sending, entries, state.issued)
    assert entries.T.tolist() == [[5, 1, 1]] + 3 * [[-1, -1, -1]]
    assert state.owner_of.tolist() == [3, 5]


def test_a_list_too_narrow_for_a_wave_is_refused() -> None:
    state = State(2, 4, 4, DEVICE)
    chosen = torch.zeros(2, 2, dtype=torch.int32, device=DEVICE)
    with pytest.raises(AssertionError, match="too narrow"):
        admit(chosen, 0, True, True, 1, state.pending, *state.tensors(), state.counts, state.slots, list_of(3, DEVICE))


def test_ops_keep_their_promises() -> None:
    state = State(3, 4, 5, DEVICE)
    chosen = torch.tensor([[0, 3], [3, -1]], dtype=torch.int32, device=DEVICE)
    outputs = (state.counts, state.slots, list_of(4, DEVICE))
    torch.library.opcheck(admit.overload, (chosen, 1, True, True, 2, state.pending, *state.tensors(), *outputs))
    outputs = (state.sending, list_of(2, DEVICE), state.issued)
    torch.library.opcheck(admit_ahead.overload, (chosen[0] + 8, 1, 2, True, 2, *state.tensors(), *outputs))
