"""Which expert gets which slot, decided on the device: for the experts a layer needs now, and ahead of time.

The directory of slots is a handful of tensors, changed in place. An expert is known by its flat number,
`layer * num_experts + expert`. `clock` counts the waves, `last_use` holds the wave in which a slot was last given or
used. `unproven` marks a slot that was given ahead of time and has not been needed by its layer yet: its row may still
be partial. `use` follows how often each expert is needed, as an exponentially moving average over its layer's steps.
"""

import ctypes
import heapq
from collections.abc import Collection
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from duomoe.kernels.configuration import Configuration
from duomoe.kernels.operator import operator

ONE = 65536
"""The value in `use` of an expert that is needed in every step."""

RATE = 5
"""Each step moves `use` by 1 / 2**RATE of the way."""

NOBODY = -1
"""The owner of an empty slot."""

LEASED = -2
"""The owner of a slot that the host fills: it is not used here, and not given away."""

EMPTY = 2**31 - 1
"""The key of an empty slot: no owner's is as large, so it is given away first."""


def _check(num_pairs: int, pending: Tensor, slot_of: Tensor, owner_of: Tensor, slots: Tensor, misses: Tensor) -> None:
    """Assert that the shapes of a wave fit together."""
    num_experts, num_slots = slot_of.shape[1], len(owner_of)
    assert pending.shape == (num_experts,), "pending is [experts]"
    assert slots.shape == (2, num_experts), "slots is [2, experts]"
    assert misses.shape[0] == 3, "misses is [3, width]"
    assert misses.shape[1] >= min(num_experts, num_pairs, num_slots), "misses is too narrow for a wave"


_NUMBERS = {torch.int32: ctypes.c_int32, torch.int64: ctypes.c_int64}


def _numbers(tensor: Tensor) -> Any:
    """Return a CPU tensor's memory as an array of Python numbers, which costs far less than tensor operations."""
    assert tensor.is_contiguous()
    return (_NUMBERS[tensor.dtype] * tensor.numel()).from_address(tensor.data_ptr())


class _State:
    """The directory's memory, as arrays, and the rule by which slots are given away."""

    def __init__(
        self,
        layer: int,
        predicted: bool,
        horizon: int,
        slot_of: Tensor,
        owner_of: Tensor,
        last_use: Tensor,
        unproven: Tensor,
        use: Tensor,
    ) -> None:
        self.layer, self.predicted, self.horizon = layer, predicted, horizon
        self.num_layers, self.num_experts = slot_of.shape
        self.slot_of, self.owner_of = _numbers(slot_of), _numbers(owner_of)
        self.last_use, self.unproven, self.use = _numbers(last_use), _numbers(unproven), _numbers(use)

    def victims(self, count: int, now: int, kept: Collection[int] = ()) -> list[int]:
        """Return the slots to give away, at most `count`, in order: not `kept`, leased or used `now`; see `admit`."""
        free = [
            slot
            for slot, used in enumerate(self.last_use)
            if used != now and slot not in kept and self.owner_of[slot] != LEASED
        ]
        # Of equal keys, the lower slot.
        return heapq.nsmallest(count, free, key=lambda slot: (-self._key(slot, now), slot))

    def _key(self, slot: int, now: int) -> int:
        owner: int = self.owner_of[slot]
        if owner < 0:
            return EMPTY
        if not self.predicted:
            return int(min(now - self.last_use[slot], EMPTY - 1))
        distance = (owner // self.num_experts - self.layer - 1) % self.num_layers + 1
        if self.unproven[slot] and distance <= self.horizon:
            return int(distance)
        return int(distance + self.num_layers * (ONE // max(self.use[owner], 1) - 1))

    def place(self, experts: list[int], slots: list[int], now: int, unproven: int) -> None:
        """Make experts, by their flat numbers, the owners of slots."""
        for expert, slot in zip(experts, slots, strict=True):
            if (previous := self.owner_of[slot]) >= 0:
                self.slot_of[previous] = -1
            self.slot_of[expert], self.owner_of[slot] = slot, expert
            self.last_use[slot], self.unproven[slot] = now, unproven


def _store_columns(to: Tensor, entries: list[tuple[int, int, int]]) -> None:
    """Store entries as the first columns of a [3, width] list, and -1 behind them."""
    numbers, width = _numbers(to), to.shape[1]
    ctypes.memset(numbers, 0xFF, to.nbytes)
    for column, entry in enumerate(entries):
        for row, value in enumerate(entry):
            numbers[row * width + column] = value


def admit_reference(
    experts: Tensor,
    layer: int,
    first: bool,
    predicted: bool,
    horizon: int,
    pending: Tensor,
    slot_of: Tensor,
    owner_of: Tensor,
    last_use: Tensor,
    unproven: Tensor,
    use: Tensor,
    clock: Tensor,
    counts: Tensor,
    slots: Tensor,
    misses: Tensor,
) -> None:
    """Compute `admit` on the CPU."""
    _check(experts.numel(), pending, slot_of, owner_of, slots, misses)
    num_experts, base = slot_of.shape[1], layer * slot_of.shape[1]
    state = _State(layer, predicted, horizon, slot_of, owner_of, last_use, unproven, use)
    waiting, often = _numbers(pending), state.use
    if first:
        chosen = set(_numbers(experts))
        for expert in range(num_experts):
            waiting[expert] = expert in chosen
            often[base + expert] += (ONE >> RATE) * waiting[expert] - (often[base + expert] >> RATE)
    time = _numbers(clock)
    time[0] += 1
    now = time[0]
    wanted = [expert for expert in range(num_experts) if waiting[expert]]
    where = state.slot_of[base : base + num_experts]
    here = [expert for expert in wanted if where[expert] >= 0]
    resumed = [expert for expert in here if state.unproven[where[expert]]]
    for expert in here:
        state.last_use[where[expert]] = now

    placed: list[int] = []
    if len(here) < len(wanted):
        absent = [expert for expert in wanted if where[expert] < 0][: misses.shape[1] - len(resumed)]
        victims = state.victims(len(absent), now)
        placed = absent[: len(victims)]
        state.place([base + expert for expert in placed], victims, now, 0)
        for expert, slot in zip(placed, victims, strict=True):
            where[expert] = slot
    served, total = _numbers(slots), _numbers(counts)
    ctypes.memset(served, 0xFF, slots.nbytes)
    fetched = set(resumed).union(placed)
    for expert in (*here, *placed):
        waiting[expert] = 0
        served[num_experts * (expert in fetched) + expert] = where[expert]
    for expert in resumed:
        state.unproven[where[expert]] = 0
    total[0] += len(here)
    total[1] += len(placed)
    total[2] += len(wanted) - len(here) - len(placed) - (0 if first else len(wanted))
    columns = [(base + expert, where[expert], 1) for expert in resumed]
    _store_columns(misses, columns + [(base + expert, where[expert], 0) for expert in placed])


@operator(
    mutates_args=(
        "pending",
        "slot_of",
        "owner_of",
        "last_use",
        "unproven",
        "use",
        "clock",
        "counts",
        "slots",
        "misses",
    )
)
def admit(
    experts: Tensor,
    layer: int,
    first: bool,
    predicted: bool,
    horizon: int,
    pending: Tensor,
    slot_of: Tensor,
    owner_of: Tensor,
    last_use: Tensor,
    unproven: Tensor,
    use: Tensor,
    clock: Tensor,
    counts: Tensor,
    slots: Tensor,
    misses: Tensor,
) -> None:
    """Give slots to the experts that a layer needs, for one wave of its step.

    Experts that have a slot are hits. The others get one each, in ascending order, as long as there are slots that this
    wave does not use and columns in `misses`; who finds none stays pending for the next wave (`first` false).

    The slot given away is the one with the largest key, the lowest of equal ones; an empty one comes before all, and a
    leased one is never given. With
    `predicted` the key is how many layers from now the owner's layer runs (1 to `layers`), plus `layers` for each whole
    step in which the owner, going by `use`, will not be needed: `layers * (ONE // use - 1)`. An owner that was fetched
    ahead for one of the next `horizon` layers is expected in this very step. Otherwise the key is the time since the
    last use.

    Args:
        experts: [tokens, top_k] int32, the experts chosen; -1 is padding. Read in the first wave alone.
        layer: the MoE layer.
        first: whether this is the step's first wave, which sets `pending` from `experts` and moves `use`.
        predicted: whether to give away what is expected latest, and not what was used least recently.
        horizon: how many layers ahead experts are fetched.
        pending: [num_experts] int32, 1 for the experts still to be served in this step, which leave when they are.
        slot_of: [layers, num_experts] int32, -1 where the expert is absent.
        owner_of: [num_slots] int32, flat numbers, NOBODY where the slot is empty, LEASED where the host fills it.
        last_use: [num_slots] int64.
        unproven: [num_slots] int32, 1 or 0.
        use: [layers, num_experts] int32, 0 to `ONE`.
        clock: [1] int64, advanced by one.
        counts: [3] int64, hits and misses so far, and how many experts no wave has served: 0 once a layer has had as
            many waves as it needs.
        slots: [2, num_experts] int32, written: the slots of the experts that can be computed at once, and those of the
            experts that `fetch` brings first; -1 for all others.
        misses: [3, width] int32, written: flat number, slot, and 1 if a fetch ahead began the row; first the latter,
            then the others, each in ascending order; -1 behind the last. `width` is at least
            min(num_experts, tokens * top_k, num_slots).
    """
    admit_reference(
        experts,
        layer,
        first,
        predicted,
        horizon,
        pending,
        slot_of,
        owner_of,
        last_use,
        unproven,
        use,
        clock,
        counts,
        slots,
        misses,
    )


@admit.register_fake
def _(
    experts: Tensor,
    layer: int,
    first: bool,
    predicted: bool,
    horizon: int,
    pending: Tensor,
    slot_of: Tensor,
    owner_of: Tensor,
    last_use: Tensor,
    unproven: Tensor,
    use: Tensor,
    clock: Tensor,
    counts: Tensor,
    slots: Tensor,
    misses: Tensor,
) -> None:
    return None


def admit_ahead_reference(
    candidates: Tensor,
    layer: int,
    limit: int,
    predicted: bool,
    horizon: int,
    slot_of: Tensor,
    owner_of: Tensor,
    last_use: Tensor,
    unproven: Tensor,
    use: Tensor,
    clock: Tensor,
    sending: Tensor,
    ahead: Tensor,
    issued: Tensor,
) -> None:
    """Compute `admit_ahead` on the CPU."""
    state = _State(layer, predicted, horizon, slot_of, owner_of, last_use, unproven, use)
    now = _numbers(clock)[0]
    _numbers(issued)[0] = now
    considered = _numbers(candidates) if _numbers(sending)[0] else ()
    wanted = [expert for expert in dict.fromkeys(considered) if expert >= 0]
    where = {expert: state.slot_of[expert] for expert in wanted}
    resumed = {expert for expert in wanted if where[expert] >= 0 and state.unproven[where[expert]]}
    placed = [expert for expert in wanted if where[expert] < 0][:limit]
    if placed:
        victims = state.victims(len(placed), now, {slot for slot in where.values() if slot >= 0})
        placed = placed[: len(victims)]
        state.place(placed, victims, now, 1)
        where.update(zip(placed, victims, strict=True))
    entered = [expert for expert in wanted if expert in resumed or expert in placed]
    _store_columns(ahead, [(expert, where[expert], int(expert in resumed)) for expert in entered])


@operator(mutates_args=("slot_of", "owner_of", "last_use", "unproven", "ahead", "issued"))
def admit_ahead(
    candidates: Tensor,
    layer: int,
    limit: int,
    predicted: bool,
    horizon: int,
    slot_of: Tensor,
    owner_of: Tensor,
    last_use: Tensor,
    unproven: Tensor,
    use: Tensor,
    clock: Tensor,
    sending: Tensor,
    ahead: Tensor,
    issued: Tensor,
) -> None:
    """Give slots to experts that later layers are expected to need; called after `admit` of `layer`.

    At most `limit` candidates that have no slot get one, in their order, as long as there are slots that the current
    wave does not use and no candidate owns; which one is given away, see `admit`.

    Args:
        candidates: [n] int32, flat numbers of experts, likeliest first; -1 is padding, and only the first of equal
            ones counts.
        layer: the MoE layer that was admitted last.
        limit: how many slots are given at most.
        predicted: as in `admit`, and so are `horizon`, `slot_of`, `owner_of`, `last_use`, `unproven`, `use`.
        horizon: see above.
        slot_of: see above.
        owner_of: see above.
        last_use: see above.
        unproven: see above; 1 for the slots given here.
        use: see above; read only.
        clock: [1] int64, read only.
        sending: [1] int32; where it is 0, no slot is given and `ahead` is empty.
        ahead: [3, n] int32, written: flat number, slot, and 1 if an earlier fetch ahead began the row, for every
            candidate whose row is not known to be whole, in their order; -1 behind the last.
        issued: [1] int64, written: the clock. `fetch_ahead` stops when the clock moves on.
    """
    admit_ahead_reference(
        candidates,
        layer,
        limit,
        predicted,
        horizon,
        slot_of,
        owner_of,
        last_use,
        unproven,
        use,
        clock,
        sending,
        ahead,
        issued,
    )


@admit_ahead.register_fake
def _(
    candidates: Tensor,
    layer: int,
    limit: int,
    predicted: bool,
    horizon: int,
    slot_of: Tensor,
    owner_of: Tensor,
    last_use: Tensor,
    unproven: Tensor,
    use: Tensor,
    clock: Tensor,
    sending: Tensor,
    ahead: Tensor,
    issued: Tensor,
) -> None:
    return None


# In both kernels the threads of a program work on the same few addresses, and several threads may hold one element.
# What some of them store must not reach the others' loads, or must have reached them. Where that matters, a barrier
# stands between the loads and the stores. It orders atomic operations of one program, too.

SIZES = ("pairs", "limit", "layer", "horizon", "num_layers", "num_experts", "num_slots", "width")
"""Integers that no kernel is compiled anew for: they gain nothing from being 1 or divisible by 16."""


@triton.jit
def _store_keys(
    keys: tl.tensor,
    now: tl.tensor,
    owner_of: tl.tensor,
    last_use: tl.tensor,
    unproven: tl.tensor,
    use: tl.tensor,
    layer: tl.tensor,
    horizon: tl.tensor,
    num_layers: tl.tensor,
    num_experts: tl.tensor,
    num_slots: tl.tensor,
    PREDICTED: tl.constexpr,
    ONE: tl.constexpr,
    EMPTY: tl.constexpr,
    LEASED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Store every slot's key in `keys`, [num_slots]: -1 for those that may not be given away.

    A block at a time: what all of them are computed from would not fit into registers.
    """
    for start in range(0, num_slots, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        inside = slot < num_slots
        owner = tl.load(owner_of + slot, mask=inside, other=-1)
        used = tl.load(last_use + slot, mask=inside, other=0)
        if PREDICTED:
            distance = (owner // num_experts - layer - 1 + num_layers) % num_layers + 1
            often = tl.maximum(tl.load(use + owner, mask=owner >= 0, other=ONE), 1)
            soon = (tl.load(unproven + slot, mask=inside, other=0) != 0) & (distance <= horizon)
            key = distance + tl.where(soon, 0, num_layers * (ONE // often - 1))
        else:
            key = tl.minimum(now - used, EMPTY - 1).to(tl.int32)
        taken = (used == now) | (owner == LEASED)
        tl.store(keys + slot, tl.where(taken, -1, tl.where(owner < 0, EMPTY, key)), mask=inside)


@triton.jit
def _choose(
    keys: tl.tensor, victims: tl.tensor, goal: tl.tensor, num_slots: tl.tensor, BLOCK_S: tl.constexpr
) -> tl.tensor:
    """Store the slots that are given away, at most `goal`, in `victims`, in order; return how many there are."""
    slot = tl.arange(0, BLOCK_S)
    key = tl.load(keys + slot, mask=slot < num_slots, other=-1)
    count = tl.minimum(goal, tl.sum((key >= 0).to(tl.int32), 0))
    for number in range(count):
        best = tl.argmax(key, 0)
        tl.store(victims + number, best)
        key = tl.where(slot == best, -1, key)
    return count


@triton.jit(do_not_specialize=SIZES)
def _admit_kernel(
    experts: tl.tensor,
    pending: tl.tensor,
    slot_of: tl.tensor,
    owner_of: tl.tensor,
    last_use: tl.tensor,
    unproven: tl.tensor,
    use: tl.tensor,
    clock: tl.tensor,
    counts: tl.tensor,
    slots: tl.tensor,
    misses: tl.tensor,
    keys: tl.tensor,
    victims: tl.tensor,
    pairs: tl.tensor,
    layer: tl.tensor,
    horizon: tl.tensor,
    num_layers: tl.tensor,
    num_experts: tl.tensor,
    num_slots: tl.tensor,
    width: tl.tensor,
    FIRST: tl.constexpr,
    PREDICTED: tl.constexpr,
    ONE: tl.constexpr,
    RATE: tl.constexpr,
    EMPTY: tl.constexpr,
    LEASED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_S: tl.constexpr,
) -> None:
    """One program admits one wave: all experts side by side, then the slots given away, one after the other."""
    expert = tl.arange(0, BLOCK_E)
    inside = expert < num_experts
    flat = layer * num_experts + expert
    often = tl.load(use + flat, mask=inside, other=0)
    if FIRST:
        tl.store(pending + expert, 0, mask=inside)
        tl.debug_barrier()
        for start in range(0, pairs, BLOCK):
            pair = start + tl.arange(0, BLOCK)
            choice = tl.load(experts + pair, mask=pair < pairs, other=-1)
            tl.store(pending + choice, 1, mask=choice >= 0)
        tl.debug_barrier()
    wanted = tl.load(pending + expert, mask=inside, other=0) != 0
    now = tl.load(clock) + 1
    slot = tl.load(slot_of + flat, mask=inside, other=-1)
    here = wanted & (slot >= 0)
    absent = wanted & (slot < 0)
    resumed = here & (tl.load(unproven + slot, mask=here, other=0) != 0)
    tl.debug_barrier()
    tl.store(clock, now)
    tl.store(last_use + slot, now, mask=here)
    tl.store(unproven + slot, 0, mask=resumed)
    if FIRST:
        tl.store(use + flat, often - (often >> RATE) + tl.where(wanted, ONE >> RATE, 0), mask=inside)
    tl.debug_barrier()

    missing = tl.sum(absent.to(tl.int32), 0)
    resumes = tl.sum(resumed.to(tl.int32), 0)
    turn = tl.cumsum(absent.to(tl.int32), 0) - 1
    count = 0
    if missing > 0:
        _store_keys(
            keys,
            now,
            owner_of,
            last_use,
            unproven,
            use,
            layer,
            horizon,
            num_layers,
            num_experts,
            num_slots,
            PREDICTED,
            ONE,
            EMPTY,
            LEASED,
            BLOCK,
        )
        tl.debug_barrier()
        count = _choose(keys, victims, tl.minimum(missing, width - resumes), num_slots, BLOCK_S)
        tl.debug_barrier()
    placed = absent & (turn < count)
    victim = tl.load(victims + turn, mask=placed, other=-1)
    previous = tl.load(owner_of + victim, mask=placed, other=-1)
    tl.debug_barrier()

    # An owner that loses its slot was not used in this wave, so the two stores to `slot_of` do not meet.
    tl.store(slot_of + previous, -1, mask=previous >= 0)
    tl.store(slot_of + flat, victim, mask=placed)
    tl.store(owner_of + victim, flat, mask=placed)
    tl.store(last_use + victim, now, mask=placed)
    tl.store(unproven + victim, 0, mask=placed)
    left = (absent & (victim < 0)).to(tl.int32)
    tl.store(pending + expert, left, mask=inside)
    tl.store(counts, tl.load(counts) + tl.sum(here.to(tl.int64), 0))
    tl.store(counts + 1, tl.load(counts + 1) + tl.sum(placed.to(tl.int64), 0))
    waited = 0 if FIRST else tl.sum(wanted.to(tl.int32), 0)
    tl.store(counts + 2, tl.load(counts + 2) + tl.sum(left, 0) - waited)
    fetched = tl.where(resumed, slot, victim)
    tl.store(slots + expert, tl.where(here & (fetched < 0), slot, -1), mask=inside)
    tl.store(slots + num_experts + expert, fetched, mask=inside)
    entry = tl.where(resumed, tl.cumsum(resumed.to(tl.int32), 0) - 1, resumes + turn)
    _store_entries(misses, width, entry, flat, fetched, resumed, fetched >= 0)
    _end_list(misses, width, resumes + count, BLOCK)


@triton.jit
def _store_entries(
    entries: tl.tensor,
    width: tl.tensor,
    column: tl.tensor,
    flat: tl.tensor,
    slot: tl.tensor,
    resume: tl.tensor,
    entered: tl.tensor,
) -> None:
    """Store what was entered at its columns of a [3, width] list."""
    tl.store(entries + column, flat, mask=entered)
    tl.store(entries + width + column, slot, mask=entered)
    tl.store(entries + 2 * width + column, resume.to(tl.int32), mask=entered)


@triton.jit
def _end_list(entries: tl.tensor, width: tl.tensor, count: tl.tensor, BLOCK: tl.constexpr) -> None:
    """Store -1 behind the first `count` columns of a [3, width] list."""
    for start in range(count, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        for row in tl.static_range(3):
            tl.store(entries + row * width + column, -1, mask=column < width)


@triton.jit(do_not_specialize=SIZES)
def _admit_ahead_kernel(
    candidates: tl.tensor,
    slot_of: tl.tensor,
    owner_of: tl.tensor,
    last_use: tl.tensor,
    unproven: tl.tensor,
    use: tl.tensor,
    clock: tl.tensor,
    sending: tl.tensor,
    ahead: tl.tensor,
    issued: tl.tensor,
    keys: tl.tensor,
    victims: tl.tensor,
    first: tl.tensor,
    width: tl.tensor,
    limit: tl.tensor,
    layer: tl.tensor,
    horizon: tl.tensor,
    num_layers: tl.tensor,
    num_experts: tl.tensor,
    num_slots: tl.tensor,
    PREDICTED: tl.constexpr,
    ONE: tl.constexpr,
    EMPTY: tl.constexpr,
    LEASED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_S: tl.constexpr,
) -> None:
    """One program goes through the candidates, a block at a time, and through the slots that they get, one by one.

    Of equal candidates the first counts. `first`, [layers, num_experts], holds its place for each expert among them.
    """
    now = tl.load(clock)
    tl.store(issued, now)
    if tl.load(sending) == 0:
        _end_list(ahead, width, 0, BLOCK)
        return
    for start in range(0, width, BLOCK):
        place = start + tl.arange(0, BLOCK)
        flat = tl.load(candidates + place, mask=place < width, other=-1)
        tl.store(first + flat, width, mask=flat >= 0)
    tl.debug_barrier()
    for start in range(0, width, BLOCK):
        place = start + tl.arange(0, BLOCK)
        flat = tl.load(candidates + place, mask=place < width, other=-1)
        tl.atomic_min(first + flat, place, mask=flat >= 0, sem="relaxed", scope="cta")
    _store_keys(
        keys,
        now,
        owner_of,
        last_use,
        unproven,
        use,
        layer,
        horizon,
        num_layers,
        num_experts,
        num_slots,
        PREDICTED,
        ONE,
        EMPTY,
        LEASED,
        BLOCK,
    )
    tl.debug_barrier()

    missing = 0
    for start in range(0, width, BLOCK):
        place = start + tl.arange(0, BLOCK)
        flat = tl.load(candidates + place, mask=place < width, other=-1)
        wanted = tl.load(first + flat, mask=flat >= 0, other=-1) == place
        slot = tl.load(slot_of + flat, mask=wanted, other=-1)
        missing += tl.sum((wanted & (slot < 0)).to(tl.int32), 0)
        tl.store(keys + slot, -1, mask=slot >= 0)
    tl.debug_barrier()
    count = 0
    if tl.minimum(missing, limit) > 0:
        count = _choose(keys, victims, tl.minimum(missing, limit), num_slots, BLOCK_S)
        tl.debug_barrier()

    # A candidate loses no slot, and each is looked up once, so no block's stores to `slot_of` meet another's loads.
    missing = 0
    entries = 0
    for start in range(0, width, BLOCK):
        place = start + tl.arange(0, BLOCK)
        flat = tl.load(candidates + place, mask=place < width, other=-1)
        wanted = tl.load(first + flat, mask=flat >= 0, other=-1) == place
        slot = tl.load(slot_of + flat, mask=wanted, other=-1)
        absent = wanted & (slot < 0)
        resumed = tl.load(unproven + slot, mask=slot >= 0, other=0) != 0
        turn = missing + tl.cumsum(absent.to(tl.int32), 0) - 1
        placed = absent & (turn < count)
        victim = tl.load(victims + turn, mask=placed, other=-1)
        previous = tl.load(owner_of + victim, mask=placed, other=-1)
        tl.debug_barrier()

        tl.store(slot_of + previous, -1, mask=previous >= 0)
        tl.store(slot_of + flat, victim, mask=placed)
        tl.store(owner_of + victim, flat, mask=placed)
        tl.store(last_use + victim, now, mask=placed)
        tl.store(unproven + victim, 1, mask=placed)
        entered = resumed | placed
        column = entries + tl.cumsum(entered.to(tl.int32), 0) - 1
        _store_entries(ahead, width, column, flat, tl.where(resumed, slot, victim), resumed, entered)
        missing += tl.sum(absent.to(tl.int32), 0)
        entries += tl.sum(entered.to(tl.int32), 0)
    _end_list(ahead, width, entries, BLOCK)


def _block(size: int) -> int:
    """Return how many elements a vector of the kernels has that holds `size`, at least one per thread of a warp."""
    power: int = triton.next_power_of_2(size)
    return max(32, power)


def _options(num_slots: int, predicted: bool) -> dict[str, int | bool]:
    """Choose so many warps that a thread's share of the keys, at most 32 up to 16,384 slots, stays in registers.

    As many registers as 16 warps can have are stated, because the compiler would rather spill than take them. For the
    same reason a thread has four elements of a `BLOCK`, by which candidates, pairs and slots are gone through.
    """
    block_s = _block(num_slots)
    warps = min(max(4, block_s // 512), 16)
    return {
        "BLOCK": 128 * warps,
        "BLOCK_S": block_s,
        "PREDICTED": predicted,
        "ONE": ONE,
        "EMPTY": EMPTY,
        "LEASED": LEASED,
        "num_warps": warps,
        "maxnreg": 128,
    }


def _admit_options(num_experts: int, num_slots: int, first: bool, predicted: bool) -> dict[str, int | bool]:
    """Add what the kernel of `admit` needs beside `_options`."""
    return _options(num_slots, predicted) | {"BLOCK_E": _block(num_experts), "FIRST": first, "RATE": RATE}


@admit.register_cuda
def admit_triton(
    experts: Tensor,
    layer: int,
    first: bool,
    predicted: bool,
    horizon: int,
    pending: Tensor,
    slot_of: Tensor,
    owner_of: Tensor,
    last_use: Tensor,
    unproven: Tensor,
    use: Tensor,
    clock: Tensor,
    counts: Tensor,
    slots: Tensor,
    misses: Tensor,
) -> None:
    """Launch the kernel of `admit`."""
    _check(experts.numel(), pending, slot_of, owner_of, slots, misses)
    num_layers, num_experts = slot_of.shape
    pairs, num_slots, width = experts.numel(), len(owner_of), misses.shape[1]
    _admit_kernel[(1,)](
        experts,
        pending,
        slot_of,
        owner_of,
        last_use,
        unproven,
        use,
        clock,
        counts,
        slots,
        misses,
        torch.empty_like(owner_of),
        torch.empty_like(owner_of),
        pairs,
        layer,
        horizon,
        num_layers,
        num_experts,
        num_slots,
        width,
        **_admit_options(num_experts, num_slots, first, predicted),
    )


@admit_ahead.register_cuda
def admit_ahead_triton(
    candidates: Tensor,
    layer: int,
    limit: int,
    predicted: bool,
    horizon: int,
    slot_of: Tensor,
    owner_of: Tensor,
    last_use: Tensor,
    unproven: Tensor,
    use: Tensor,
    clock: Tensor,
    sending: Tensor,
    ahead: Tensor,
    issued: Tensor,
) -> None:
    """Launch the kernel of `admit_ahead`."""
    assert ahead.shape == (3, len(candidates)), "ahead is [3, candidates]"
    num_layers, num_experts = slot_of.shape
    num_slots, width = len(owner_of), len(candidates)
    _admit_ahead_kernel[(1,)](
        candidates,
        slot_of,
        owner_of,
        last_use,
        unproven,
        use,
        clock,
        sending,
        ahead,
        issued,
        torch.empty_like(owner_of),
        torch.empty_like(owner_of),
        torch.empty_like(slot_of),
        width,
        limit,
        layer,
        horizon,
        num_layers,
        num_experts,
        num_slots,
        **_options(num_slots, predicted),
    )


def configurations(dtype: torch.dtype, capability: int) -> list[Configuration]:
    """List what the launchers choose for few and for the most slots; the directory has no float dtype.

    How many pairs and candidates there are is known at run time only, so these serve batches of any size.
    """
    names = ("pending", "slot_of", "owner_of", "unproven", "use", "slots", "misses", "keys", "victims")
    types = {name: "*i32:16" for name in names} | {name: "*i64:16" for name in ("last_use", "clock")}
    types |= {name: "i32" for name in ("layer", "horizon", "num_layers", "num_experts", "num_slots", "width")}
    admitting = types | {"experts": "*i32:16", "counts": "*i64:16", "pairs": "i32"}
    unused = ("pending", "slots", "misses")
    placing = {name: kind for name, kind in types.items() if name not in unused}
    placing |= {name: "*i32:16" for name in ("candidates", "sending", "ahead", "first")}
    placing |= {"issued": "*i64:16", "limit": "i32"}
    return [
        Configuration(_admit_kernel, admitting, _admit_options(60, 400, True, False)),
        Configuration(_admit_kernel, admitting, _admit_options(128, 4000, True, True)),
        Configuration(_admit_kernel, admitting, _admit_options(8, 8000, False, True)),
        Configuration(_admit_kernel, admitting, _admit_options(512, 16384, True, True)),
        Configuration(_admit_ahead_kernel, placing, _options(400, False)),
        Configuration(_admit_ahead_kernel, placing, _options(4000, True)),
        Configuration(_admit_ahead_kernel, placing, _options(16384, True)),
    ]
