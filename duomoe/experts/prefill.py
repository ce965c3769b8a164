"""Prefill: experts stream through leased slots, each at most once in a pass, ahead of the layer that computes them.

The pass is layer-major: all tokens of all its prompts go through a layer before any goes on, so an expert that has
been computed is not needed again in this pass. What has a slot of its own is used where it lies; the rest streams
through a ring of slots that the pass has leased. As soon as a layer has sent for all it needs, the next layer's experts
follow, under the computation of this one's last waves and of the next one's attention. Which of them the router will
choose is not known then, so only those are sent that probably will be: with many tokens nearly all, the most popular
first, and with few tokens none.

What decode will want is adopted: the expert's slot in the ring and the slot of the least useful expert change roles,
and nothing is copied. What is useful follows from what prompts used most and most recently; and beside requests that
run, from what decode has seen them need.

Between any two of its steps decode steps may run. They change the directory, so it is read anew at the next layer's
router, where the pass waits anyway; decisions are made and launched there, before another decode step can be.
"""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from duomoe.experts.compute import LayerSum
from duomoe.experts.lease import Lease
from duomoe.experts.page_routing import PageRouting, Prompt
from duomoe.experts.slots import Directory, sent
from duomoe.kernels.admit import LEASED, NOBODY, ONE, RATE
from duomoe.memory.pages import PAGE_SIZE

# Sending an expert ahead wastes its transfer when it is not chosen. When it is, that gains only what the link would
# have been idle until the router's choice is known, which a few experts fill: so those that are nearly certain.
WORTH_SENDING = 0.9

# A use counts half as much for an expert's worth to decode as one this many tokens later.
HALF_LIFE = 32

# One slot computes while the other is filled.
SMALLEST_RING = 2


def ring_slots(slots: int, num_experts: int) -> int:
    """Return how many of so many slots experts stream through; the others are kept for decode.

    Under the attention of a long prompt half a layer can cross: a smaller ring would let the link wait.

    Args:
        slots: of all layers.
        num_experts: of one layer.
    """
    return min(slots, max(SMALLEST_RING, slots // 4, min(slots // 2, num_experts // 2)))


def prompt_use(counts: Tensor, tokens: Tensor | int, top_k: int) -> Tensor:
    """Return in which share of tokens each expert was needed, for decode to begin with; at most 1.

    Args:
        counts: [..., num_experts], how many tokens chose each, in one layer; a few more are added that chose evenly.
        tokens: [...], how many there were.
        top_k: experts per token.
    """
    tokens = torch.as_tensor(tokens)
    return ((counts + 1) / (tokens + counts.shape[-1] / top_k)[..., None]).clamp(max=1)


def either(first: Tensor, second: Tensor) -> Tensor:
    """Return the chance that one of two independent things needs an expert."""
    return 1 - (1 - first) * (1 - second)


def _weights(ages: Tensor) -> Tensor:
    """Return what a use so many tokens ago counts for an expert's worth to decode; never 0."""
    return torch.exp2(-ages.double().clamp(max=HALF_LIFE * 500) / HALF_LIFE)


class _Prompts:
    """The prompts of one pass, and what is known of each.

    Args:
        prompts: in the order of their tokens in the pass.
        routing: what pages that were computed before have chosen; None where nobody has noted that.
    """

    def __init__(
        self, prompts: Sequence[Prompt], routing: PageRouting | None, num_layers: int, num_experts: int
    ) -> None:
        computed = torch.tensor([prompt.tokens for prompt in prompts])
        self._of = torch.arange(len(prompts)).repeat_interleave(computed)
        self._weights = torch.cat([_weights(torch.arange(prompt.tokens - 1, -1, -1)) for prompt in prompts])
        size = len(prompts), num_layers, num_experts
        self._known_counts, self._known_worth = (torch.zeros(size, dtype=torch.float64) for _ in range(2))
        for number, prompt in enumerate(prompts):
            if routing is not None and prompt.pages:
                counts = routing.of(prompt.pages)
                ages = prompt.behind + PAGE_SIZE * torch.arange(len(prompt.pages) - 1, -1, -1)
                self._known_counts[number] = counts.sum(0)
                self._known_worth[number] = (counts * _weights(ages)[:, None, None]).sum(0)
        self._tokens = computed + PAGE_SIZE * torch.tensor([len(prompt.pages) for prompt in prompts])

    def shares(self, index: int, experts: Tensor) -> tuple[Tensor, Tensor]:
        """Return how probably the next tokens need each expert of a layer, float64 [experts].

        Args:
            index: the MoE layer's number.
            experts: [tokens, top_k] int64, what the pass's tokens chose.

        Returns:
            By what all tokens of the prompts chose, and by what the last ones did. Each of several prompts counts.
        """
        (prompts, _, num_experts), top_k = self._known_counts.shape, experts.shape[1]
        places = (experts if prompts == 1 else experts + self._of[:, None] * num_experts).flatten()
        weights = self._weights[:, None].expand_as(experts).flatten()
        counts = places.bincount(minlength=prompts * num_experts).view(prompts, num_experts)
        worth = places.bincount(weights, prompts * num_experts).view(prompts, num_experts)
        counts, worth = counts + self._known_counts[:, index], worth + self._known_worth[:, index]
        late = worth / (worth.sum(1, keepdim=True) / top_k)
        return _any(prompt_use(counts, self._tokens, top_k)), _any(late.clamp(max=1))


def _any(shares: Tensor) -> Tensor:
    """Return the chance that any of several needs an expert, [experts] of [several, experts]."""
    return 1 - (1 - shares).prod(0)


class PrefillStream:
    """Streams one pass after the other through slots that it leases.

    It changes the directory on the host, and sends it to the device before a decode step is launched. After one, it
    reads it again.

    Args:
        lease: no slots yet.
        directory: of all slots.
        top_k: experts per token.

    Attributes:
        stale: decode steps may have changed the directory since it was read.
    """

    def __init__(self, lease: Lease, directory: Directory, top_k: int) -> None:
        self.lease, self.directory, self.top_k = lease, directory, top_k
        self.num_layers: int = directory.slot_of.shape[0]
        self.num_experts: int = directory.slot_of.shape[1]
        slots = len(lease.pool)
        self.ring = ring_slots(slots, self.num_experts)
        # So many of a layer's experts can have slots outside the ring; their slots in it wait to be adopted.
        self.kept: int = -(-(slots - self.ring) // max(1, self.num_layers))
        self.stale = True
        self._changed = False  # the device does not know yet
        self._owners = torch.full((slots,), NOBODY)  # whose each slot is
        # Each expert's slot; and a last place, for what NOBODY and LEASED would have.
        self._flat = torch.full((self.num_layers * self.num_experts + 1,), -1)
        self._places = self._flat[:-1].view(self.num_layers, self.num_experts)
        self._use = torch.zeros(self.num_layers, self.num_experts)  # how probably a step needs an expert
        self._ranks = torch.zeros(self.num_layers, self.num_experts, dtype=torch.int64)
        self._gained: set[int] = set()  # slots that got other owners in this pass
        self._likely: dict[int, list[int]] = {}  # of layers, the experts that the pass will probably need
        self._prompts: _Prompts | None = None
        self._prompt_use = self._use  # the same by the prompts of this pass alone
        self._beside = False
        self._tokens = 0
        # Of all passes so far, by which it is judged what the next one will need; at first as if all were alike.
        self._seen_tokens = self.num_experts / top_k
        self._seen_uses = torch.ones(self.num_layers, self.num_experts, dtype=torch.float64)

    def begin(self, tokens: int, prompts: Sequence[Prompt], routing: PageRouting | None, beside: bool) -> None:
        """Begin a pass: lease the ring from those who are needed least.

        Args:
            tokens: how many the pass computes.
            prompts: whose; none where they are the next tokens of requests that run.
            routing: what pages that were computed before have chosen.
            beside: other requests run, and go on.
        """
        if self.stale:
            self._see()
        self._prompts = _Prompts(prompts, routing, self.num_layers, self.num_experts) if prompts else None
        self._tokens, self._beside = tokens, beside
        self._prompt_use = torch.zeros_like(self._use)
        self._gained.clear()
        self._likely.clear()
        # Those that have slots before all others, so that each layer that is still to come keeps its share.
        self._ranks = _ranks(self._use + (self._places >= 0))
        self._lease(self._least_useful(self.ring)[1])

    def send_ahead(self, index: int) -> None:
        """Send a layer's experts that are likely to be needed to whatever slots of the ring can be spared."""
        if index >= self.num_layers:
            return
        if index not in self._likely:
            share = (self._seen_uses[index] / self._seen_tokens).clamp(max=1)
            likely = 1 - (1 - share) ** self._tokens > WORTH_SENDING
            order = share.argsort(descending=True, stable=True)
            self._likely[index] = order[likely[order]].tolist()  # host-sync ok: is on the host
        places = self._places[index].tolist()  # host-sync ok: likewise
        for expert in self.lease.absent(index, self._likely[index]):
            if places[expert] < 0 and not self.lease.fetch(index, expert, "streamed_bytes", self._spared_below):
                break

    @property
    def _spared_below(self) -> int:
        """A slot in the ring counts minus its expert's rank in its layer; those that wait to be adopted are above."""
        return 1 - self.kept

    def _idle_use(self, owner: int) -> int:
        """What counts as the last use of a slot in the ring whose expert does not wait to be adopted."""
        return -self.num_experts - int(self._ranks.view(-1)[owner])

    def run(self, total: LayerSum, index: int, experts: Tensor) -> Iterator[None]:
        """Compute a layer's experts, wave by wave, and send the next layer's when all of this one's are sent.

        Args:
            total: the layer's sum.
            index: the MoE layer's number.
            experts: [tokens, top_k], the router's choice; -1 for padding.

        Yields:
            After each wave that was fetched.
        """
        experts = experts.cpu().long()  # host-sync ok: prefill decides on the host what to send
        experts = experts[experts[:, 0] >= 0]
        if self.stale:
            self._see()
            self._adopt(index - 1)
        counts = experts.flatten().bincount(minlength=self.num_experts)
        lease, places = self.lease, self._places[index]
        needed, has_slot = counts > 0, places >= 0
        absent = (needed & ~has_slot).nonzero().flatten().tolist()  # host-sync ok: is on the host
        for expert, slot in lease.residents(index).items():
            if expert not in absent:  # it was sent ahead in vain
                lease.stamp(slot, self._idle_use(index * self.num_experts + expert))
        stamps: dict[int, int] = {}

        def meanwhile() -> None:
            here = (needed & has_slot).nonzero().flatten().tolist()  # host-sync ok: is on the host
            if here:
                lease.traffic.hits += len(here)
                lease.wave(total, index, dict(zip(here, places[here].tolist(), strict=True)))  # host-sync ok: likewise
            self._note_use(index, experts, counts)
            stamps.update(enumerate((-self._ranks[index]).tolist()))  # host-sync ok: likewise

        yield from lease.run(
            total,
            index,
            absent,
            "streamed_bytes",
            self._spared_below,
            stamps,
            meanwhile,
            after_wave=lambda: self.send_ahead(index + 1),
            make_room=lambda: self._adopt(index),
        )
        self._adopt(index)
        self.send_ahead(index + 1)

    def end(self) -> None:
        """End a pass: let decode begin with what it has computed last, and with what the prompts needed."""
        if self.stale:
            self._see()
            self._adopt(self.num_layers - 1)
        self.give_back()
        if self._prompts is not None:
            self._use = either(self._use, self._prompt_use) if self._beside else self._prompt_use
        clock, last_use = self.directory.clock, self.directory.last_use
        self.directory.use.copy_(sent((self._use * ONE).int(), clock.device))
        if self._beside:
            gained = torch.zeros(len(self._owners), dtype=torch.bool)
            gained[list(self._gained)] = True
            last_use.copy_(torch.where(sent(gained, clock.device), clock, last_use))
        else:  # what the prompts needed most counts as what was used last
            last_use.copy_(clock - sent(self._uselessness(), clock.device))

    def give_back(self) -> None:
        """End a pass, perhaps before its end: give the ring back, with what is in it."""
        if self.stale:
            self._see()
        owners = {}
        for slot in sorted(self.lease.slots):
            owner = self.lease.give_back(slot)
            absent = owner is not None and self._places[owner] < 0
            owners[slot] = owner[0] * self.num_experts + owner[1] if owner is not None and absent else NOBODY
        self._assign(owners)
        self.flush()

    def forget(self) -> None:
        """After a failure no slot has an owner, or is leased."""
        self.lease.forget()
        for slot in list(self.lease.slots):
            self.lease.give_back(slot)
        self._changed = False
        self.directory.clear()
        self.stale = True

    def flush(self) -> None:
        """Let the device know what has changed: a decode step may come."""
        if self._changed:
            self.directory.write(self._places, self._owners)
            self._changed = False

    def _see(self) -> None:
        """Read the directory."""
        assert not self._changed, "what decode steps have changed was what the host knew"
        self._owners, use = self.directory.read()
        self._use = use / ONE
        self._flat.fill_(-1)
        slots = (self._owners >= 0).nonzero().flatten()  # host-sync ok: is on the host
        self._flat[self._owners[slots]] = slots
        self.stale = False

    def _assign(self, owners: Mapping[int, int]) -> None:
        """Give slots new owners, whose rows are whole in them; or nobody; or lease them."""
        if not owners:
            return
        assert not self.stale, "nobody knows whose slots these are"
        slots, experts = torch.tensor([list(owners), list(owners.values())])
        self._flat[self._owners[slots].clamp(min=NOBODY)] = -1
        self._flat[experts.clamp(min=NOBODY)] = slots
        self._flat[-1] = -1
        self._owners[slots] = experts
        self._gained.update(owners)
        self._changed = True

    def _least_useful(self, count: int) -> tuple[list[int], list[int]]:
        """Return how useless the least useful slots are, so many of them, and which, the worst first."""
        worst = self._uselessness().topk(min(count, len(self._owners)))
        return worst.values.tolist(), worst.indices.tolist()  # host-sync ok: is on the host

    def _uselessness(self) -> Tensor:
        """Return int64 [slots]: the rank of its owner in its layer; more for an empty slot, -1 for a leased one."""
        ranks = self._ranks.view(-1)[self._owners.clamp(min=0)]
        ranks = torch.where(self._owners == NOBODY, self.num_experts, ranks)
        return torch.where(self._owners == LEASED, -1, ranks)

    def _adopt(self, index: int) -> None:
        """Let experts of a layer keep their slots in the ring, where they are more useful than what has a slot.

        Decode steps may have changed the directory; then it is left for when that has been read.
        """
        if index < 0 or self.stale:
            return
        lease, ranks = self.lease, self._ranks[index].tolist()  # host-sync ok: is on the host
        mine = {expert: slot for expert, slot in lease.residents(index).items() if lease.is_settled(slot)}
        places = self._places[index].tolist()  # host-sync ok: likewise
        absent = (expert for expert in mine if places[expert] < 0)  # decode has not fetched it meanwhile
        wanted = sorted(absent, key=ranks.__getitem__)
        adopted, victims = {}, []
        for expert, uselessness, victim in zip(wanted, *self._least_useful(len(wanted)), strict=True):
            if ranks[expert] >= uselessness:
                break
            adopted[mine[expert]] = index * self.num_experts + expert
            victims.append(victim)
        for expert, slot in mine.items():
            if slot in adopted:
                lease.give_back(slot)
            else:
                lease.stamp(slot, self._idle_use(index * self.num_experts + expert))
        self._lease(victims, adopted)

    def _lease(self, slots: list[int], adopted: Mapping[int, int] = MappingProxyType({})) -> None:
        """Lease slots, with what is in them; slots that were leased go to the owners that adopt them."""
        held: dict[int, tuple[int, int] | None] = dict.fromkeys(slots)
        uses = {}
        for slot in slots:
            owner = int(self._owners[slot])
            index, expert = divmod(owner, self.num_experts)
            if (
                owner >= 0 and self.lease.slot(index, expert) is None
            ):  # decode may have fetched what is in the ring, too
                held[slot], uses[slot] = (index, expert), self._idle_use(owner)
        self._assign({**adopted, **dict.fromkeys(slots, LEASED)})
        self.lease.take(held, uses)

    def _note_use(self, index: int, experts: Tensor, counts: Tensor) -> None:
        """Note which experts a layer's tokens chose, for decode and for later passes; `counts` says how often."""
        self._seen_uses[index] += counts
        if index == self.num_layers - 1:
            self._seen_tokens += len(experts)
        if self._prompts is None:  # as `admit` has it
            self._use[index] += ((counts > 0).float() - self._use[index]) / (1 << RATE)
            self._ranks[index] = _ranks(self._use[index])
            return
        every, late = self._prompts.shares(index, experts)
        self._prompt_use[index] = every
        self._ranks[index] = _ranks(either(self._use[index].double(), late) if self._beside else late)


def _ranks(worth: Tensor) -> Tensor:
    """Return each expert's rank in its layer, from 0 for the one that is worth most; [..., experts] as `worth`."""
    return worth.argsort(descending=True, stable=True).argsort()
