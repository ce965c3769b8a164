"""Which expert gets which slot, decided on the device: for the experts a layer needs now, and ahead of time.

The directory of slots is a handful of tensors, changed in place. An expert is known by its flat number,
`layer * num_experts + expert`. `clock` counts the waves, `last_use` holds the wave in which a slot was last given or
used. `unproven` marks a slot that was given ahead of time and has not been needed by its layer yet: its row may still
be partial. `use` follows how often each expert is needed, as an exponentially moving average over its layer's steps.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from duomoe.kernels.configuration import Configuration
from duomoe.kernels.operator import operator

ONE = 65536
"""The value in `use` of an expert that is needed in every step."""

RATE = 3
"""Each step moves `use` by 1 / 2**RATE of the way."""

EMPTY = 2**31 - 1
"""The key of an empty slot: no owner's is as large, so it is given away first."""


def _check(num_pairs: int, pending: Tensor, slot_of: Tensor, owner_of: Tensor, slots: Tensor, misses: Tensor) -> None:
    """Assert that the shapes of a wave fit together."""
    num_experts, num_slots = slot_of.shape[1], len(owner_of)
    assert pending.shape == (num_experts,), "pending is [experts]"
    assert slots.shape == (2, num_experts), "slots is [2, experts]"
    assert misses.shape[0] == 3, "misses is [3, width]"
    assert misses.shape[1] >= min(num_experts, num_pairs, num_slots), "misses is too narrow for a wave"


def _victims(
    layer: int,
    predicted: bool,
    horizon: int,
    slot_of: Tensor,
    owner_of: Tensor,
    last_use: Tensor,
    unproven: Tensor,
    use: Tensor,
    now: int,
) -> list[int]:
    """Return the slots that were not used in this wave, those to be given away first in front; see `admit`."""
    num_layers, num_experts = slot_of.shape
    if predicted:
        distance = (owner_of // num_experts - layer - 1) % num_layers + 1
        often = use.view(-1)[owner_of.clamp(min=0)].clamp(min=1)
        key = distance + num_layers * (ONE // often - 1)
        key = torch.where((unproven != 0) & (distance <= horizon), distance, key)
    else:
        key = (now - last_use).clamp(max=EMPTY - 1)
    order = torch.where(owner_of < 0, EMPTY, key).sort(descending=True, stable=True).indices
    victims: list[int] = order[last_use[order] != now].tolist()  # host-sync ok: the reference runs on the CPU
    return victims


def _give(expert: int, slot: int, slot_of: Tensor, owner_of: Tensor) -> None:
    """Make an expert, by its flat number, the owner of a slot."""
    where = slot_of.view(-1)
    previous = int(owner_of[slot])  # host-sync ok: the reference runs on the CPU
    if previous >= 0:
        where[previous] = -1
    where[expert] = slot
    owner_of[slot] = expert


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
    """Compute `admit` with plain PyTorch."""
    _check(experts.numel(), pending, slot_of, owner_of, slots, misses)
    if first:
        pending.zero_()
        pending[experts[experts >= 0]] = 1
        use[layer] += (ONE >> RATE) * pending - (use[layer] >> RATE)
    clock += 1
    now = int(clock)  # host-sync ok: the reference runs on the CPU
    slots.fill_(-1)
    misses.fill_(-1)

    wanted = pending.nonzero().flatten()
    where = slot_of[layer, wanted]
    here, absent = wanted[where >= 0], wanted[where < 0].tolist()  # host-sync ok: the reference runs on the CPU
    found = where[where >= 0]
    partial = unproven[found] != 0
    slots[0, here] = torch.where(partial, -1, found)
    slots[1, here] = torch.where(partial, found, -1)
    last_use[found] = now
    unproven[found] = 0
    pending[here] = 0
    counts[0] += len(here)

    flat, base = slot_of.view(-1), layer * slot_of.shape[1]
    entries = [[base + expert, int(flat[base + expert]), 1] for expert in here[partial].tolist()]  # host-sync ok
    if absent:
        victims = _victims(layer, predicted, horizon, slot_of, owner_of, last_use, unproven, use, now)
        room = misses.shape[1] - len(entries)
        for expert, slot in list(zip(absent, victims, strict=False))[:room]:
            _give(base + expert, slot, slot_of, owner_of)
            last_use[slot], unproven[slot] = now, 0
            slots[1, expert], pending[expert] = slot, 0
            counts[1] += 1
            entries.append([base + expert, slot, 0])
    if entries:
        misses[:, : len(entries)] = torch.tensor(entries, dtype=torch.int32).T


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

    The slot given away is the one with the largest key, the lowest of equal ones; an empty one comes before all. With
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
        owner_of: [num_slots] int32, flat numbers, -1 where the slot is empty.
        last_use: [num_slots] int64.
        unproven: [num_slots] int32, 1 or 0.
        use: [layers, num_experts] int32, 0 to `ONE`.
        clock: [1] int64, advanced by one.
        counts: [2] int64, hits and misses so far.
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
    ahead: Tensor,
    issued: Tensor,
) -> None:
    """Compute `admit_ahead` with plain PyTorch."""
    now = int(clock)  # host-sync ok: the reference runs on the CPU
    issued.copy_(clock)
    ahead.fill_(-1)

    wanted = list(dict.fromkeys(candidates[candidates >= 0].tolist()))  # host-sync ok: the reference runs on the CPU
    where = slot_of.view(-1)[wanted].tolist()  # host-sync ok: the reference runs on the CPU
    victims = []
    if limit > 0 and -1 in where:
        victims = _victims(layer, predicted, horizon, slot_of, owner_of, last_use, unproven, use, now)
    free = iter([slot for slot in victims if slot not in where][:limit])
    entries = []
    for expert, slot in zip(wanted, where, strict=True):
        if slot < 0:
            slot = next(free, -1)
            if slot < 0:
                continue
            _give(expert, slot, slot_of, owner_of)
            last_use[slot], unproven[slot] = now, 1
            entries.append([expert, slot, 0])
        elif unproven[slot]:  # host-sync ok: the reference runs on the CPU
            entries.append([expert, slot, 1])
    if entries:
        ahead[:, : len(entries)] = torch.tensor(entries, dtype=torch.int32).T


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
    ahead: Tensor,
    issued: Tensor,
) -> None:
    return None
