"""Training predictors on traces, and measuring them beside what they must beat.

A forecast is what a predictor, a baseline or a control says of some decode tokens: `forecast[index][ahead - 1]` are the
experts expected in MoE layer index + ahead by one who stands at layer index, int [tokens, width], likeliest first.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from duomoe.errors import InputError
from duomoe.experts.predictor import HORIZON, SHARE_EPS, SHARE_RATE, Predictor
from duomoe.experts.replay import Rule, decodes_of, forecasts, replay
from duomoe.experts.trace import Trace
from duomoe.models import Model, Routing

Forecast = list[list[Tensor]]

SEED = 0
EPOCHS = 8
MAX_STEPS = 4000  # so that a large trace takes no longer than minutes
BATCH = 512  # tokens
LEARNING_RATE = 4e-3
WEIGHT_DECAY = 0.01
AGAIN_WEIGHT_DECAY = 0.1
HISTORY_RANK = 256

SLOT_SHARES = (0.1, 0.15, 0.25, 0.5)  # of all experts, for hit rates

HELD_OUT = 5  # of one trace every fifth request is held out


@dataclass(frozen=True)
class Scores:
    """How good a forecast was, by how far it looked and from which layer; 0 where there is no layer to look at."""

    exact: Tensor  # [horizon, layers], the share of tokens all of whose top_k experts are the first top_k named
    half: Tensor  # as exact: at least half of them are
    precision: Tensor  # [horizon, layers, width], how often the expert named in a rank is needed
    top_k: int

    def recall(self, count: int) -> Tensor:
        """Return which share of the needed experts is among the first `count` named, [horizon, layers]."""
        return self.precision[:, :, :count].sum(-1) / self.top_k

    def means(self, ahead: int) -> list[float]:
        """Return exact, half, recall@k and recall@width, each the mean over the layers that can look so far ahead."""
        layers = self.exact.shape[1] - ahead
        each = (self.exact, self.half, self.recall(self.top_k), self.recall(self.precision.shape[2]))
        return [values[ahead - 1, :layers].mean().item() for values in each]  # host-sync ok: training is offline


def split(trace: Trace) -> tuple[Trace, Trace]:
    """Return a trace's requests for training and those held out.

    Raises:
        InputError: when there are too few of them.
    """
    held_out = trace.request % HELD_OUT == HELD_OUT - 1
    if not bool((trace.decode & held_out).any()):
        raise InputError(f"the trace has too few prompts: of every {HELD_OUT}, one is held out to measure on")
    return select(trace, ~held_out), select(trace, held_out)


def select(trace: Trace, tokens: Tensor) -> Trace:
    """Return the tokens of a trace for which a mask is true."""
    names = ("experts", "request", "position", "decode", "hidden")
    return replace(trace, **{name: value[tokens] for name in names if (value := getattr(trace, name)) is not None})


def check(trace: Trace, model: Model, needs_hidden: bool) -> None:
    """Check that a trace's tensors are what they should be for the model.

    Raises:
        InputError: when they are not, or the trace has no hidden states although they are needed.
    """
    c = model.config
    tokens = len(trace.experts)
    whole = (
        trace.experts.shape == (tokens, len(c.moe_layers), c.top_k)
        and trace.request.shape == trace.position.shape == trace.decode.shape == (tokens,)
        and trace.num_experts == c.num_experts
        and bool(((trace.experts >= 0) & (trace.experts < c.num_experts)).all())
    )
    if trace.hidden is not None:
        whole = whole and trace.hidden.shape == (tokens, len(c.moe_layers), c.hidden_size)
        whole = whole and bool(trace.hidden.isfinite().all())
    if not whole:
        raise InputError("the trace is damaged; make it again with python -m duomoe.trace")
    if not bool(trace.decode.any()):
        raise InputError("the trace has no decode steps; make one with more --max-new-tokens")
    if needs_hidden and trace.hidden is None:
        raise InputError("this kind of predictor needs the routers' inputs; make the trace with --hidden")


def one_hot(experts: Tensor, num_experts: int) -> Tensor:
    """Return float32 [..., num_experts], 1 at the experts of [..., top_k]."""
    return torch.zeros(*experts.shape[:-1], num_experts).scatter_(-1, experts.long(), 1.0)


# --- Training


def train_learned(model: Model, trace: Trace, rank: int, quiet: bool) -> dict[str, Tensor]:
    """Train the correction of a `LearnedPredictor`, to agree with the true routers' probabilities.

    The loss is the cross entropy between the softmax of a later router's own logits and that of the predicted ones,
    which teaches more than its top_k alone. Tokens of prefill count too: they are routed like those of decode.

    Returns:
        The tensors of its file, but for the reliability.
    """
    c = model.config
    assert trace.hidden is not None
    hidden, routers = trace.hidden, _routers(model)
    layers, experts = len(c.moe_layers), c.num_experts
    draw = torch.Generator().manual_seed(SEED)
    weights = {
        "down": torch.randn(layers, rank, c.hidden_size, generator=draw) / c.hidden_size**0.5,
        "down_bias": torch.zeros(layers, rank),
        "up": torch.zeros(layers, HORIZON, experts, rank),
        "up_bias": torch.zeros(layers, HORIZON, experts),
    }

    def loss(tokens: Tensor) -> Tensor:
        h = hidden[tokens].transpose(0, 1).float()  # [layers, tokens, hidden]
        wanted = torch.bmm(h, routers.mT).softmax(-1)
        state = F.silu(torch.baddbmm(weights["down_bias"][:, None], h, weights["down"].mT))
        total = h.new_zeros(())
        for ahead in _horizons(layers):
            seers = layers - ahead
            up, bias = weights["up"][:seers, ahead - 1], weights["up_bias"][:seers, ahead - 1, None]
            logits = torch.bmm(h[:seers], routers[ahead:].mT) + torch.baddbmm(bias, state[:seers], up.mT)
            total = total - (wanted[ahead:] * logits.log_softmax(-1)).sum(-1).mean(1).sum()
        return total

    _descend(weights, loss, torch.arange(len(hidden)), draw, quiet)
    return weights | _train_again(trace, quiet)


def _train_again(trace: Trace, quiet: bool) -> dict[str, Tensor]:
    """Train the forecast of a `LearnedPredictor`: binary cross entropy with what a request's next token chose.

    Inputs are scaled to unit variance, so that one rate of weight decay suits all; the result is for those unscaled.
    """
    assert trace.hidden is not None
    hidden, logit_share = trace.hidden, shares(trace).logit(SHARE_EPS)
    layers, experts = trace.experts.shape[1], trace.num_experts
    scale = torch.stack([hidden[:, layer].float().std(0) for layer in range(layers)])[:, None] + 1e-6
    weights = {
        "again": torch.zeros(layers, experts, hidden.shape[2]),
        "again_share": torch.ones(layers, experts),
        "again_chosen": torch.zeros(layers, experts),
        "again_bias": torch.zeros(layers, experts),
    }

    def loss(tokens: Tensor) -> Tensor:
        h = hidden[tokens].transpose(0, 1).float() / scale
        chosen, then = (one_hot(trace.experts[at].transpose(0, 1), experts) for at in (tokens, tokens + 1))
        share = logit_share[tokens].transpose(0, 1).float()
        logits = torch.baddbmm(weights["again_bias"][:, None], h, weights["again"].mT)
        logits = logits + weights["again_share"][:, None] * share + weights["again_chosen"][:, None] * chosen
        return F.binary_cross_entropy_with_logits(logits, then, reduction="none").sum(-1).mean(1).sum()

    draw = torch.Generator().manual_seed(SEED)
    followed = (trace.request[1:] == trace.request[:-1]).nonzero().squeeze(1)  # host-sync ok: training is offline
    _descend(weights, loss, followed, draw, quiet, AGAIN_WEIGHT_DECAY)
    return weights | {"again": weights["again"] / scale}


def shares(trace: Trace) -> Tensor:
    """Return the share of tokens that chose each expert, as known at each token: float16 [tokens, layers, experts].

    Of a prompt's tokens so far, as if a few more had chosen evenly (see `PrefillStream`), and then a moving average
    (see `LearnedPredictor.next_use`).
    """
    tokens, layers, top_k = trace.experts.shape
    found = torch.empty(tokens, layers, trace.num_experts, dtype=torch.float16)
    for number in trace.request.unique():
        mine = trace.request == number
        chosen, decode = one_hot(trace.experts[mine], trace.num_experts), trace.decode[mine]
        prompt = int((~decode).sum())
        seen = torch.arange(1, prompt + 1)[:, None, None] + trace.num_experts / top_k
        share = torch.cat([(chosen[:prompt].cumsum(0) + 1) / seen, chosen[prompt:]])
        for token in range(prompt, len(share)):
            share[token] = share[token - 1].lerp(share[token], SHARE_RATE)
        found[mine] = share.half()
    return found


def train_history(model: Model, trace: Trace, quiet: bool) -> dict[str, Tensor]:
    """Train a `HistoryPredictor`: multi-label binary cross entropy, as in arXiv 2509.07379.

    Returns:
        The tensors of its file, but for the reliability.
    """
    c = model.config
    layers, experts, width = len(c.moe_layers), c.num_experts, HISTORY_RANK
    draw = torch.Generator().manual_seed(SEED)
    popularity, affinity = _popularity(trace), _affinity(trace)
    inputs = HORIZON * experts
    weights = {
        "chosen": torch.randn(layers, experts, width, generator=draw) / (layers * c.top_k) ** 0.5,
        "by_affinity": torch.randn(inputs, width, generator=draw) / inputs**0.5,
        "by_popularity": torch.randn(inputs, width, generator=draw) / inputs**0.5,
        "bias": torch.zeros(layers, width),
        "up": torch.zeros(layers, HORIZON, experts, width),
        "up_bias": torch.zeros(layers, HORIZON, experts),
    }

    def tables() -> dict[str, Tensor]:
        return {
            "chosen": weights["chosen"],
            "affinity": affinity @ weights["by_affinity"],
            "popularity": popularity @ weights["by_popularity"] + weights["bias"],
            "up": weights["up"],
            "up_bias": weights["up_bias"],
        }

    def loss(tokens: Tensor) -> Tensor:
        chosen = one_hot(trace.experts[tokens].transpose(0, 1), experts)  # [layers, tokens, experts]
        table = tables()
        history = torch.bmm(chosen, table["chosen"]).cumsum(0)
        state = F.silu(history + torch.baddbmm(table["popularity"][:, None], chosen, table["affinity"]))
        total = history.new_zeros(())
        for ahead in _horizons(layers):
            seers = layers - ahead
            up, bias = table["up"][:seers, ahead - 1], table["up_bias"][:seers, ahead - 1, None]
            logits = torch.baddbmm(bias, state[:seers], up.mT)
            wrong = F.binary_cross_entropy_with_logits(logits, chosen[ahead:], reduction="none")
            total = total + wrong.sum(-1).mean(1).sum()
        return total

    _descend(weights, loss, torch.arange(len(trace.experts)), draw, quiet)
    return {name: table.detach() for name, table in tables().items()}


def _descend(
    weights: dict[str, Tensor],
    loss: Callable[[Tensor], Tensor],
    tokens: Tensor,
    draw: torch.Generator,
    quiet: bool,
    weight_decay: float = WEIGHT_DECAY,
) -> None:
    """Lower a loss, a function of the numbers of some of the tokens, by changing the weights in place."""
    for weight in weights.values():
        weight.requires_grad_()
    optimizer = torch.optim.AdamW(weights.values(), LEARNING_RATE, weight_decay=weight_decay)
    epochs = (tokens[torch.randperm(len(tokens), generator=draw)].split(BATCH) for _ in range(EPOCHS))
    batches = list(itertools.islice(itertools.chain.from_iterable(epochs), MAX_STEPS))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=len(batches), pct_start=0.1)
    with tqdm(batches, desc="training", unit="step", disable=quiet, leave=False) as bar:
        for batch in bar:
            value = loss(batch)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{value.item():.3f}", refresh=False)  # host-sync ok: training is offline
    for weight in weights.values():
        weight.requires_grad_(False)


def _routers(model: Model) -> Tensor:
    """Return all routers, float32 [layers, num_experts, hidden]."""
    routers = [model.blocks[layer].router for layer in model.config.moe_layers]
    return torch.stack([router.float() for router in routers if router is not None])


def _horizons(layers: int) -> range:
    return range(1, min(HORIZON, layers - 1) + 1)


def _popularity(trace: Trace) -> Tensor:
    """Return for each layer the popularity of the next layers' experts, [layers, HORIZON * num_experts].

    It is how often an expert is chosen, over what chance would give.
    """
    layers = trace.experts.shape[1]
    found = torch.zeros(layers, HORIZON, trace.num_experts)
    for index in range(1, layers):
        share = usage(trace, index) / usage(trace, index).mean()
        for ahead in range(1, min(HORIZON, index) + 1):
            found[index - ahead, ahead - 1] = share
    return found.flatten(1)


def _affinity(trace: Trace) -> Tensor:
    """Return how the next layers' experts go with each expert of a layer, [layers, num_experts, HORIZON * num_experts].

    It is the share of the tokens that chose the one which then chose the other, over what chance would give, and
    divided by top_k: added up over a token's choice it is a mean.
    """
    tokens, layers, top_k = trace.experts.shape
    found = torch.zeros(layers, trace.num_experts, HORIZON, trace.num_experts)
    for index in range(layers):
        for ahead in range(1, min(HORIZON, layers - 1 - index) + 1):
            together = torch.zeros(trace.num_experts, trace.num_experts)
            for part in range(0, tokens, 1 << 14):
                chosen = trace.experts[part : part + (1 << 14)]
                here, there = (one_hot(chosen[:, at], trace.num_experts) for at in (index, index + ahead))
                together += here.t() @ there
            share = together / together.sum(1, keepdim=True).clamp(min=1)
            found[index, :, ahead - 1] = share * trace.num_experts / top_k
    return found.flatten(2)


# --- Measuring


def foresee(predictor: Predictor, trace: Trace, dtype: torch.dtype) -> Forecast:
    """Return what a predictor says of a trace's decode tokens."""
    chosen = trace.experts[trace.decode].int()
    hidden = None if trace.hidden is None else trace.hidden[trace.decode]
    forecast = []
    for index in range(chosen.shape[1]):
        h = torch.empty(len(chosen), 0) if hidden is None else hidden[:, index].to(dtype)
        experts = chosen[:, index].contiguous()
        forecast.append(predictor.predict(index, h, Routing(torch.ones(experts.shape), experts)))
    return forecast


def measure(forecast: Forecast, trace: Trace) -> Scores:
    """Compare a forecast with what a trace's decode tokens chose."""
    chosen = trace.experts[trace.decode]
    layers, top_k = chosen.shape[1:]
    width = forecast[0][0].shape[1]
    scores = Scores(
        torch.zeros(HORIZON, layers), torch.zeros(HORIZON, layers), torch.zeros(HORIZON, layers, width), top_k
    )
    for index, named in enumerate(forecast):
        for ahead, experts in enumerate(named):
            needed = (experts[:, :, None] == chosen[:, index + ahead + 1, None, :]).any(-1)
            right = needed[:, :top_k].sum(1)
            scores.exact[ahead, index] = (right == top_k).float().mean()
            scores.half[ahead, index] = (2 * right >= top_k).float().mean()
            scores.precision[ahead, index] = needed.float().mean(0)
    return scores


def shuffled(forecast: Forecast) -> Forecast:
    """Control: give each token what was said of another one."""
    draw = torch.Generator().manual_seed(SEED)
    tokens = len(forecast[0][0])
    # Not a plain permutation, which may leave tokens where they are: all move on by one in a random order.
    order = torch.randperm(tokens, generator=draw)
    other = torch.empty_like(order)
    other[order] = order.roll(1)
    return [[experts[other] for experts in named] for named in forecast]


def by_popularity(train: Trace, held_out: Trace, width: int) -> Forecast:
    """Control: name each layer's experts by how often they are chosen in training."""
    tokens = int(held_out.decode.sum())
    return _each_layer(
        train.experts.shape[1], lambda index, layer: _rank(usage(train, layer), width).expand(tokens, -1)
    )


def previous_token(train: Trace, held_out: Trace, width: int) -> Forecast:
    """Control: name what the token before chose in the layer, and then the most popular."""
    before = (held_out.decode.nonzero() - 1).squeeze(1)  # host-sync ok: training is offline

    def named(index: int, layer: int) -> Tensor:
        experts = held_out.experts[before, layer].long()
        liking = torch.arange(experts.shape[1], 0, -1.0).expand(experts.shape)
        popularity = usage(train, layer) / usage(train, layer).sum()
        return _rank(popularity.expand(len(experts), -1).scatter_add(1, experts, liking), width)

    return _each_layer(train.experts.shape[1], named)


def moe_infinity(train: Trace, held_out: Trace, width: int) -> Forecast:
    """Baseline: MoE-Infinity's (arXiv 2401.14361) match of request-level activation matrices.

    What a request has chosen so far, counted by layer and expert, is compared by cosine with the counts of all training
    requests; the experts are named by their counts in the one that is most alike.
    """
    layers, experts = train.experts.shape[1], train.num_experts
    library = torch.stack(
        [one_hot(train.experts[train.request == number], experts).sum(0) for number in train.request.unique()]
    )
    unit = F.normalize(library.flatten(1))
    forecast: Forecast = [[] for _ in range(layers)]
    matches: list[list[Tensor]] = [[] for _ in range(layers)]
    for number in held_out.request.unique():
        mine = held_out.request == number
        chosen = one_hot(held_out.experts[mine], experts)
        so_far = chosen.cumsum(0) - chosen
        decode = held_out.decode[mine]
        chosen, so_far = chosen[decode], so_far[decode]
        for index in range(layers):
            so_far[:, index] += chosen[:, index]
            matches[index].append((so_far.flatten(1) @ unit.t()).argmax(1))
    for index, found in enumerate(matches):
        match = torch.cat(found)
        for layer in range(index + 1, min(index + HORIZON, layers - 1) + 1):
            forecast[index].append(_rank(library[match, layer], width))
    return forecast


def usage(trace: Trace, layer: int) -> Tensor:
    """Return how often each expert of a layer is chosen, float32 [num_experts]."""
    return trace.experts[:, layer].flatten().int().bincount(minlength=trace.num_experts).float()


def _each_layer(layers: int, named: Callable[[int, int], Tensor]) -> Forecast:
    """Return the forecast that `named` makes at a layer for another one."""
    return [
        [named(index, layer) for layer in range(index + 1, min(index + HORIZON, layers - 1) + 1)]
        for index in range(layers)
    ]


def _rank(scores: Tensor, width: int) -> Tensor:
    """Return the best `width` of each row's last dimension, of equals the lower number first."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :width]


def hit_rates(predictor: Predictor, trace: Trace, dtype: torch.dtype) -> Iterator[str]:
    """Yield the lines of a table: the hit rates of decode by the rule that chooses victims, and the predictor's."""
    decodes = decodes_of(trace)
    layers, top_k = trace.experts.shape[1:]
    experts, needed = layers * trace.num_experts, sum(decodes.steps) * layers * top_k
    forecast = forecasts(predictor, decodes, dtype)
    rules: list[Rule] = ["lru", "average", "belady"] if forecast is None else ["lru", "average", "forecast", "belady"]
    yield "slots  " + f"{'of experts':16}" + "".join(f"{rule:>11}" for rule in rules)
    for share in SLOT_SHARES:
        slots = max(top_k, round(share * experts))
        rates = [replay(decodes, slots, rule, forecast) / needed for rule in rules]
        yield f"{slots:<7}{share:<16.0%}" + "".join(f"{100 * rate:10.1f}%" for rate in rates)
    yield "hit rates of decode, each request in slots of its own, and nothing sent ahead"


def table(scores: dict[str, Scores]) -> Iterator[str]:
    """Yield the lines of a table: first the means over layers, then the first of `scores` layer by layer."""
    name, first = next(iter(scores.items()))
    layers, width, top_k = first.exact.shape[1], first.precision.shape[2], first.top_k
    columns = ["exact", f">= {(top_k + 1) // 2} of {top_k}", f"recall@{top_k}", f"recall@{width}"]
    yield "ahead  " + f"{'':16}" + "".join(f"{column:>11}" for column in columns)
    for ahead in _horizons(layers):
        for who, found in scores.items():
            yield f"{ahead:<7}{who:16}" + "".join(f"{100 * value:10.1f}%" for value in found.means(ahead))
    yield ""
    controls = list(scores)[1:]
    yield "ahead  layer" + "".join(f"{column:>11}" for column in columns) + "".join(f"{who:>16}" for who in controls)
    for ahead in _horizons(layers):
        for index in range(layers - ahead):
            mine = [first.exact, first.half, first.recall(top_k), first.recall(width)]
            others = [scores[who].recall(top_k) for who in controls]
            yield (
                f"{ahead:<7}{index + ahead:<5}"
                + "".join(f"{100 * value[ahead - 1, index]:10.1f}%" for value in mine)
                + "".join(f"{100 * value[ahead - 1, index]:15.1f}%" for value in others)
            )
    yield f"layer: the one predicted, of those with experts; columns 3 to 6 are {name}'s, the rest recall@{top_k}"
