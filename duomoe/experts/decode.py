"""Decode: experts are cached; what a layer lacks is fetched, and what the next ones are expected to need is sent ahead.

All is decided on the device, so that the host never waits within a step. For each layer `admit` looks the routed
experts up, gives slots to those that lack one, and lists what to copy; the fetcher copies while the experts that are
there compute; and a predictor names the experts of the layers to come. Those that are absent are sent ahead in the
time in which the link would be idle, that is until the next `admit`. Where it also forecasts which experts the layer
needs in the next step, slots are given away by that and not by the average that `admit` keeps.

Looking ahead takes time, which a fast link does not give back. So steps are compared with and without (`Payoff`), and
where it does not pay, nothing is sent ahead. On a CPU the predictor is then not asked either. In a CUDA graph it goes
on, on a stream beside the computation, and `admit_ahead` reads from the device that nothing is to be sent.

A step that needs more experts than there are slots runs in waves; their number is known from shapes.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from duomoe.experts.compute import LayerSum
from duomoe.experts.fetcher import Fetcher
from duomoe.experts.link import Traffic
from duomoe.experts.payoff import Payoff
from duomoe.experts.predictor import Predictor
from duomoe.experts.slots import Directory, SlotPool
from duomoe.kernels import admit, admit_ahead
from duomoe.models import Routing

# Sending an expert ahead gains its transfer when it is needed and wastes it when it is not: worth it from this
# probability on.
WORTH_SENDING = 0.5

# How many absent experts one layer may send ahead: each costs a slot, and a slow link brings no second one in time.
SENT_AHEAD = 1


class _Demand:
    """What `admit` writes for one layer; of its own, because copies read it while other layers decide."""

    def __init__(self, num_experts: int, width: int, device: torch.device) -> None:
        self.pending = torch.zeros(num_experts, dtype=torch.int32, device=device)  # 1 for those that await their wave
        self.slots = torch.empty(2, num_experts, dtype=torch.int32, device=device)  # of those there, and those fetched
        self.misses = torch.empty(3, width, dtype=torch.int32, device=device)  # see Fetcher.fetch


class _Ahead:
    """What `admit_ahead` writes for one layer."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.copies = torch.empty(3, width, dtype=torch.int32, device=device)  # see Fetcher.fetch_ahead
        self.issued = torch.empty(1, dtype=torch.int64, device=device)  # the clock by then


class Decode:
    """Runs decode steps over a pool of slots.

    Args:
        directory: of the slots, on the compute device.
        pool: the slots.
        free: how many of them are never leased while a step runs.
        fetcher: copies rows into them.
        predicted: give away the expert that is expected to be needed last; otherwise the one used least recently.
        predictor: names experts to send ahead, in steps in which `payoff` says so; None sends nothing.
    """

    def __init__(
        self,
        directory: Directory,
        pool: SlotPool,
        free: int,
        fetcher: Fetcher,
        predicted: bool,
        predictor: Predictor | None,
    ) -> None:
        self.directory, self.pool, self.free, self.fetcher = directory, pool, free, fetcher
        self.predicted, self.predictor = predicted, predictor
        self.num_layers, self.num_experts = directory.slot_of.shape
        self.horizon = predictor.horizon if predictor else 0
        self.counts = torch.zeros(3, dtype=torch.int64, device=directory.clock.device)  # see `admit`
        self.payoff = Payoff()
        self.sending = torch.ones(1, dtype=torch.int32, device=directory.clock.device)  # what `payoff` says
        # Looking ahead is a handful of small kernels, which take as long as an expert's computation.
        self._side = torch.cuda.Stream(directory.clock.device) if predictor and directory.clock.is_cuda else None
        self._demands: dict[tuple[int, int], _Demand] = {}  # by layer and width
        self._aheads: dict[tuple[int, int], _Ahead] = {}
        # How many of the predictor's choices are worth sending, by layer and by how far ahead it is.
        self._trusted: list[list[int]] = []
        if predictor is not None:
            worth = (predictor.reliability >= WORTH_SENDING).int().cumprod(-1).sum(-1)
            self._trusted = worth.tolist()  # host-sync ok: once, at construction, and on the host

    def start(self) -> None:
        """Begin after a prefill, with what the directory says of its use."""
        if self.predictor is not None:
            self.predictor.start(self.directory.use)
        self.payoff.settle()

    def note_step(self, sequences: int, seconds: float) -> None:
        """Take in how long a step of so many sequences took, and decide whether the next one looks ahead."""
        if self.predictor is not None:
            before = self.payoff.pays
            self.payoff.note(sequences, seconds)
            if self.payoff.pays != before:  # rarely: on a GPU it is a kernel
                self.sending.fill_(self.payoff.pays)

    def run(self, total: LayerSum, index: int, h: Tensor, routing: Routing) -> None:
        """Compute the experts of one layer, [tokens, hidden] and their routing, into its sum."""
        state = self.directory
        most = min(self.num_experts, routing.experts.numel())  # that the layer can need
        waves, width = -(-most // self.free), min(most, len(self.pool))
        if (index, width) not in self._demands:
            self._demands[index, width] = _Demand(self.num_experts, width, state.clock.device)
        demand = self._demands[index, width]
        for wave in range(waves):
            admit(
                routing.experts, index, wave == 0, self.predicted, self.horizon, demand.pending,
                *state.tensors, self.counts, demand.slots, demand.misses,
            )  # fmt: skip
            self.fetcher.fetch(demand.misses)
            # On a GPU a graph may hold this step and also later ones, so there `sending` decides.
            if wave == waves - 1 and (self.payoff.pays or self._side is not None):
                with self._beside():
                    self._send_ahead(index, self._ask(index, h, routing))
            total.wave(self.pool.views[index], demand.slots[0], width)
            self.fetcher.join()
            total.wave(self.pool.views[index], demand.slots[1], width)
        if self._side is not None:
            torch.cuda.current_stream().wait_stream(self._side)

    def _beside(self) -> AbstractContextManager[object]:
        """On a GPU, let what is launched within run beside the experts' computation."""
        if self._side is None:
            return nullcontext()
        self._side.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self._side)

    def _ask(self, index: int, h: Tensor, routing: Routing) -> list[Tensor]:
        """Ask the predictor what the layer will need in the next step, for the directory, and what the next layers do.

        Returns:
            The experts worth sending ahead, flat numbers or -1 for padding, those of the nearest layer first.
        """
        if self.predictor is None:
            return []
        use = self.predictor.next_use(index, h, routing)
        if use is not None:
            self.directory.use[index].copy_(use)
        padding = routing.experts[:, 0] < 0
        routing = routing._replace(experts=routing.experts.clamp(min=0))  # what padding chose is ignored in the end
        candidates = []
        for distance, experts in enumerate(self.predictor.predict(index, h, routing), start=1):
            trusted = experts[:, : self._trusted[distance - 1][index]]
            numbers = (trusted + (index + distance) * self.num_experts).masked_fill(padding[:, None], -1)
            candidates.append(numbers.t().flatten())  # the likeliest of all tokens first
        return candidates

    def _send_ahead(self, index: int, candidates: list[Tensor]) -> None:
        """Give slots to what is worth sending ahead, as far as the limit goes, and send it."""
        width = sum(map(len, candidates))
        if width == 0:
            return
        if (index, width) not in self._aheads:
            self._aheads[index, width] = _Ahead(width, self.directory.clock.device)
        state, ahead = self.directory, self._aheads[index, width]
        admit_ahead(
            torch.cat(candidates), index, SENT_AHEAD, self.predicted, self.horizon,
            *state.tensors, self.sending, ahead.copies, ahead.issued,
        )  # fmt: skip
        self.fetcher.fetch_ahead(ahead.copies, ahead.issued)

    def end(self) -> None:
        """End a step: what was being sent ahead stops where it stands."""
        self.directory.clock += 1
        self.fetcher.stop()

    def forget(self) -> None:
        """After a failure, wherever it was, nothing is under way."""
        self.fetcher.drop()
        self.counts[2] = 0

    def count(self, traffic: Traffic) -> None:
        """Add what all steps so far have counted; waits for the device."""
        hits, misses, _ = self.counts.tolist()  # host-sync ok: between requests, not between tokens
        traffic.hits += hits
        traffic.misses += misses
        self.fetcher.count(traffic)
