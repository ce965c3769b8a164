"""A model of decode's cache: how often a trace's experts would have been there, by the rule that chooses victims.

Each request decodes alone, in slots that begin with the experts its prompt used most; all requests advance side by
side. Nothing is sent ahead. What the rules `lru`, `average` and `forecast` give away is what `admit` does.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from duomoe.experts.predictor import Predictor
from duomoe.experts.prefill import prompt_use
from duomoe.experts.trace import Trace
from duomoe.kernels.admit import ONE, RATE
from duomoe.models import Routing

Rule = Literal["lru", "average", "forecast", "belady"]


@dataclass(frozen=True)
class Decodes:
    """The decode steps of a trace's requests, those with the most steps first.

    Attributes:
        steps: of each request.
        experts: int64 [requests, steps, layers, top_k]; -1 behind a request's end.
        use: int32 [requests, layers, num_experts], in how many of `ONE` tokens of its prompt each expert was needed,
            as a prefill leaves it.
        hidden: [requests, steps, layers, hidden], what the routers saw; None where the trace has it not.
    """

    steps: list[int]
    experts: Tensor
    use: Tensor
    hidden: Tensor | None


def decodes_of(trace: Trace) -> Decodes:
    """Return the decode steps of a trace's requests."""
    layers, top_k = trace.experts.shape[1:]
    requests = [trace.request == number for number in trace.request.unique()]
    requests.sort(key=lambda mine: -int((mine & trace.decode).sum()))
    steps = [int((mine & trace.decode).sum()) for mine in requests]
    experts = torch.full((len(steps), max(steps), layers, top_k), -1)
    use = torch.empty(len(steps), layers, trace.num_experts, dtype=torch.int32)
    hidden = None if trace.hidden is None else trace.hidden.new_zeros(*experts.shape[:3], trace.hidden.shape[-1])
    for row, mine in enumerate(requests):
        decode, prompt = mine & trace.decode, trace.experts[mine & ~trace.decode]
        experts[row, : steps[row]] = trace.experts[decode].long()
        if hidden is not None and trace.hidden is not None:
            hidden[row, : steps[row]] = trace.hidden[decode]
        for layer in range(layers):
            counts = prompt[:, layer].flatten().int().bincount(minlength=trace.num_experts)
            use[row, layer] = (prompt_use(counts, len(prompt), top_k) * ONE).int()
    return Decodes(steps, experts, use, hidden)


def forecasts(predictor: Predictor, decodes: Decodes, dtype: torch.dtype) -> Tensor | None:
    """Return what a predictor expects of each layer's next step, int32 [requests, steps, layers, num_experts].

    It is asked as decode asks it, token by token. None when it does not forecast.
    """
    if decodes.hidden is None:
        return None
    requests, steps, layers, _ = decodes.experts.shape
    found = torch.zeros(requests, steps, layers, decodes.use.shape[2], dtype=torch.int32)
    for row, length in enumerate(decodes.steps):
        predictor.start(decodes.use[row])
        for step in range(length):
            for layer in range(layers):
                experts = decodes.experts[row, step, layer, None].int()
                h = decodes.hidden[row, step, layer, None].to(dtype)
                use = predictor.next_use(layer, h, Routing(torch.ones(experts.shape), experts))
                if use is None:
                    return None
                found[row, step, layer] = use
    return found


def replay(decodes: Decodes, num_slots: int, rule: Rule, forecast: Tensor | None = None) -> int:
    """Return how many of the experts needed are hits.

    Args:
        decodes: the steps.
        num_slots: of each request's cache, at least top_k.
        rule: gives away the expert used least recently (`lru`), that is expected last going by a moving average of its
            use (`average`) or by a forecast, or that is really needed last (`belady`, which no rule can beat).
        forecast: see `forecasts`.
    """
    steps, layers, top_k = decodes.experts.shape[1:]
    num_experts = decodes.use.shape[2]
    experts = (decodes.experts + num_experts * torch.arange(layers)[:, None]).sort(-1).values
    use = decodes.use.flatten(1).clone()
    # The least used in the lowest slot: of equals it is given away first.
    owner = use.sort(dim=1, descending=True, stable=True).indices[:, :num_slots].flip(1).contiguous()
    slot_of = torch.full_like(use, -1, dtype=torch.int64)
    slot_of.scatter_(1, owner, torch.arange(num_slots).expand_as(owner))
    last_use = torch.zeros_like(slot_of)
    needed = _next_needed(decodes, num_experts) if rule == "belady" else None
    hits = now = 0
    for step in range(steps):
        rows = sum(length > step for length in decodes.steps)
        owners, places, times, uses = owner[:rows], slot_of[:rows], last_use[:rows], use[:rows]
        for layer in range(layers):
            now += 1
            wanted = experts[:rows, step, layer]
            here = places.gather(1, wanted) >= 0
            hits += int(here.sum())
            times.scatter_(1, wanted, now)
            of_layer = uses[:, layer * num_experts : (layer + 1) * num_experts]
            of_layer -= of_layer >> RATE
            uses.scatter_add_(1, wanted, torch.full_like(wanted, ONE >> RATE, dtype=torch.int32))

            used = times.gather(1, owners)
            if rule == "lru":
                keys = now - used
            elif needed is not None:
                # In this step the layers up to this one have been.
                later = needed[:rows, step : step + 2].flatten(1)
                passed = (owners // num_experts <= layer) * (layers * num_experts)
                keys = later.gather(1, owners + passed) * layers + owners // num_experts
            else:
                distance = (owners // num_experts - layer - 1) % layers + 1
                keys = distance + layers * (ONE // uses.gather(1, owners).clamp(min=1) - 1)
            # Unequal numbers in the order of the keys, and of equal keys the lower slot first.
            keys = torch.where(used == now, -1, keys * num_slots + torch.arange(num_slots - 1, -1, -1))
            victims = keys.topk(top_k, 1).indices
            row, miss = (~here).nonzero(as_tuple=True)  # host-sync ok: a replay is offline
            slot = victims[row, ((~here).cumsum(1) - 1)[row, miss]]
            places[row, owners[row, slot]] = -1
            places[row, wanted[row, miss]] = slot
            owners[row, slot] = wanted[row, miss]
            if rule == "forecast":
                assert forecast is not None
                of_layer.copy_(forecast[:rows, step, layer])
    return hits


def _next_needed(decodes: Decodes, num_experts: int) -> Tensor:
    """Return the first step, from each step on, in which each expert is needed; the number of steps where none is.

    It is [requests, steps + 1, layers * experts].
    """
    requests, steps, layers, _ = decodes.experts.shape
    found = torch.full((requests, steps + 1, layers, num_experts), steps)
    for step in range(steps - 1, -1, -1):
        found[:, step] = found[:, step + 1]
        rows = sum(length > step for length in decodes.steps)
        found[:rows, step].scatter_(2, decodes.experts[:rows, step], step)
    return found.flatten(2)
