"""Predictors: which experts the next layers are likely to need, from what is known at a layer.

A predictor is a safetensors file. Every kind has `reliability`, float32 [horizon, layers, width]; the rest is named by
`SHAPES` of its class. Its metadata has `format` ("duomoe-predictor-1"), `kind` and `fingerprint` of the model.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from duomoe.errors import InputError
from duomoe.experts.tensor_file import FileSchema, TensorSchema, save_tensors
from duomoe.kernels import route
from duomoe.kernels.admit import ONE, RATE
from duomoe.models import Model, ModelConfig, Routing

FORMAT = "duomoe-predictor-1"

FILE = FileSchema("a predictor", FORMAT, "train one with python -m duomoe.train_predictor")
FLOATS = ("F32", "F16", "BF16")

HORIZON = 3

# How often the gate's predictions are right, a row for each layer ahead, by quarters of the router's top_k: what is
# assumed of a model for which nobody has measured it. Measured on the embedded model.
TYPICAL_RELIABILITY = (
    (0.98, 0.92, 0.77, 0.54, 0.29, 0.17),
    (0.92, 0.80, 0.64, 0.46, 0.30, 0.22),
    (0.86, 0.72, 0.57, 0.41, 0.30, 0.22),
)

# A step moves the share of tokens that choose an expert by so much of the way, and a share is kept this far from 0 and
# 1, where its logit would be infinite.
SHARE_RATE = 1 / 2**RATE
SHARE_EPS = 1e-3

# Of what is expected of an expert, so much is its share, the rest the forecast of the next step: a slot is worth
# keeping for the steps after the next, too. On the embedded model neither alone is as good (docs/measurements.md).
SHARE_WEIGHT = 0.5


class Predictor(ABC):
    """Says at each MoE layer of a decode step which experts the next layers are likely to need.

    Layers are counted among those that have experts. `predict` is device work only, so a CUDA graph can hold it.

    Attributes:
        horizon: how many layers ahead it looks.
        width: how many experts it names for each.
        reliability: float32 [horizon, layers, width] on the CPU. Entry [ahead - 1, index, rank] is the measured
            probability that what `predict` names in that rank, at layer `index`, for layer `index + ahead`, is needed
            there; 0 where there is no such layer.

    Args:
        model: whose experts are predicted.
        reliability: as above.
    """

    KIND: ClassVar[str]
    # A file's tensors: the names of their dimensions. Of one name are the same; `sizes_of` knows some.
    SHAPES: ClassVar[dict[str, tuple[str, ...]]] = {"reliability": ("horizon", "layers", "width")}

    def __init__(self, model: Model, reliability: Tensor) -> None:
        self.reliability = reliability.float().cpu()  # host-sync ok: once, at construction
        self.horizon, self.layers, self.width = reliability.shape
        self.num_experts = model.config.num_experts

    @classmethod
    @abstractmethod
    def of_tensors(cls, model: Model, tensors: Mapping[str, Tensor]) -> "Predictor":
        """Make one of a file's tensors, which have the shapes of `SHAPES`."""

    @abstractmethod
    def predict(self, index: int, h: Tensor, routing: Routing) -> list[Tensor]:
        """Name the experts that the next layers are likely to need.

        Called once for each MoE layer of a decode step, in ascending order, with the same tokens.

        Args:
            index: the MoE layer.
            h: [tokens, hidden], its router's input.
            routing: its choice; only the experts count.

        Returns:
            For ahead = 1, 2, … up to the horizon or the last layer: int32 [tokens, width], contiguous, the experts
            expected in layer index + ahead, likeliest first. Empty at the last layer.
        """

    def start(self, use: Tensor) -> None:  # noqa: B027  # who remembers nothing has nothing to do
        """Begin a decode with what the prefill saw.

        Args:
            use: int32 [layers, experts], in how many of `ONE` (kernels/admit.py) of its tokens each expert was needed.
        """

    def next_use(self, index: int, h: Tensor, routing: Routing) -> Tensor | None:
        """Forecast which experts of the same layer the coming steps will need; None from who does not forecast.

        Called once for each MoE layer of a decode step, in ascending order.

        Args:
            index: the MoE layer.
            h: [tokens, hidden], its router's input.
            routing: its choice; only the experts count, which are -1 for padding.

        Returns:
            int32 [experts], in how many of `ONE` steps the expert is needed by any of the sequences; the next step
            counts most.
        """
        return None

    def _next_layers(self, model: Model, weights: Tensor) -> list[Tensor]:
        """Return for each layer what concerns the layers it can look ahead to, of [layers, horizon, experts, …].

        Each is [ahead * num_experts, …], on the model's device: prepared, because slicing costs as much as computing.
        """
        kept = (layer[: self.layers - 1 - index] for index, layer in enumerate(_by_layer(model, weights)))
        return [layer.flatten(0, 1) for layer in kept]

    def _ranked(self, scores: Tensor) -> list[Tensor]:
        """Return the experts by descending score, from [tokens, ahead * num_experts]; of equals the lower first."""
        tokens = scores.shape[0]
        _, experts = route(scores.view(-1, self.num_experts), self.width, False)
        return list(experts.view(tokens, -1, self.width).transpose(0, 1).contiguous().unbind(0))


class GatePredictor(Predictor):
    """The routers of the next layers, applied to this layer's router input; needs no training.

    Args:
        model: whose routers they are.
        reliability: as measured for this model; None assumes what is typical, for top_k experts and half as many more.
    """

    KIND = "gate"

    def __init__(self, model: Model, reliability: Tensor | None = None) -> None:
        super().__init__(model, typical_reliability(model.config) if reliability is None else reliability)
        routers = [model.blocks[layer].router for layer in model.config.moe_layers]
        # One copy, and a view of it for each layer: the routers of the next ones as one matrix.
        stacked = torch.stack([router for router in routers if router is not None])
        self.routers = [stacked[index + 1 : index + 1 + self.horizon].flatten(0, 1) for index in range(self.layers)]

    @classmethod
    def of_tensors(cls, model: Model, tensors: Mapping[str, Tensor]) -> "GatePredictor":
        """Make one of a file's tensors."""
        return cls(model, tensors["reliability"])

    def predict(self, index: int, h: Tensor, routing: Routing) -> list[Tensor]:
        """Rank by the next routers' logits; see `Predictor.predict`."""
        if index == self.layers - 1:
            return []
        return self._ranked(F.linear(h, self.routers[index]))


class LearnedPredictor(GatePredictor):
    """The gate plus a trained correction for what this layer's experts and the next attention will change.

    The next routers' logits are corrected by up @ silu(down @ h + down_bias) + up_bias.

    That a token's successor chooses an expert of the same layer again is forecast with the logit
    again @ h + again_share * logit(share) + again_chosen * (1 if the token chose it, else 0) + again_bias,
    where `share` is the part of the tokens that chose the expert: of the prefill's, and then a moving average. What is
    expected of the coming steps is the mean of that probability and the share.

    Args:
        model: whose experts are predicted.
        tensors: of `SHAPES`.
    """

    KIND = "learned"
    SHAPES: ClassVar[dict[str, tuple[str, ...]]] = Predictor.SHAPES | {
        "down": ("layers", "rank", "hidden"),
        "down_bias": ("layers", "rank"),
        "up": ("layers", "horizon", "experts", "rank"),
        "up_bias": ("layers", "horizon", "experts"),
        "again": ("layers", "experts", "hidden"),
        "again_share": ("layers", "experts"),
        "again_chosen": ("layers", "experts"),
        "again_bias": ("layers", "experts"),
    }

    def __init__(self, model: Model, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(model, tensors["reliability"])
        self.down, self.down_bias = (_by_layer(model, tensors[name]) for name in ("down", "down_bias"))
        self.up, self.up_bias = (self._next_layers(model, tensors[name]) for name in ("up", "up_bias"))
        self.again = _by_layer(model, tensors["again"])
        # Float32 where nothing is gained from less; a share would not even move by small steps.
        self.again_share, self.again_chosen, self.again_bias = (
            tensors[f"again_{name}"].to(model.device, torch.float32).unbind(0) for name in ("share", "chosen", "bias")
        )
        self.share = torch.full(
            (self.layers, self.num_experts), model.config.top_k / self.num_experts, device=model.device
        )
        self._shares = self.share.unbind(0)
        self._numbers = torch.arange(self.num_experts, dtype=torch.int32, device=model.device)

    @classmethod
    def of_tensors(cls, model: Model, tensors: Mapping[str, Tensor]) -> "LearnedPredictor":
        """Make one of a file's tensors."""
        return cls(model, tensors)

    def predict(self, index: int, h: Tensor, routing: Routing) -> list[Tensor]:
        """Rank by the next routers' corrected logits; see `Predictor.predict`."""
        if index == self.layers - 1:
            return []
        state = F.silu(F.linear(h, self.down[index], self.down_bias[index]))
        gate = F.linear(h, self.routers[index], self.up_bias[index])
        return self._ranked(torch.addmm(gate, state, self.up[index].t()))

    def start(self, use: Tensor) -> None:
        """Take the share of the prefill's tokens; see `Predictor.start`."""
        self.share.copy_(use)
        self.share /= ONE

    def next_use(self, index: int, h: Tensor, routing: Routing) -> Tensor:
        """Forecast by the formulas above; see `Predictor.next_use`."""
        share, top_k = self._shares[index], routing.experts.shape[1]
        chosen = (routing.experts[:, :, None] == self._numbers).sum(1, dtype=torch.float32)  # none by padding
        count = chosen.sum(0)
        pairs = count.sum()  # top_k for each token
        news = torch.addcmul(count, share, pairs, value=-1 / top_k)  # for each token, its choice less the share
        share.addcdiv_(news, pairs.clamp(min=1), value=top_k * SHARE_RATE)

        known = torch.addcmul(self.again_bias[index], self.again_share[index], share.logit(SHARE_EPS))
        known = torch.addcmul(known, chosen, self.again_chosen[index])
        need = torch.addmm(known.to(h.dtype), h, self.again[index].t()).sigmoid().float().lerp(share, SHARE_WEIGHT)
        unneeded = (1 - need).masked_fill(routing.experts[:, :1] < 0, 1).prod(0)
        return torch.rsub(unneeded, ONE, alpha=ONE).int()


class HistoryPredictor(Predictor):
    """The predictor of DuoServe-MoE (arXiv 2509.07379), which looks at choices only, never at hidden states.

    Its inputs are the experts that the token chose in the layers so far, the popularity of the next layers' experts,
    and their affinity to this layer's choice; through an MLP. Popularity is constant and affinity a sum over the chosen
    experts, so the MLP's first layer is kept as tables with a row for every expert: `chosen` is added up over the
    layers so far, `affinity` counts for this layer only, and `popularity` is a layer's constant.

    Args:
        model: whose experts are predicted.
        tensors: of `SHAPES`.
    """

    KIND = "history"
    SHAPES: ClassVar[dict[str, tuple[str, ...]]] = Predictor.SHAPES | {
        "chosen": ("layers", "experts", "rank"),
        "affinity": ("layers", "experts", "rank"),
        "popularity": ("layers", "rank"),
        "up": ("layers", "horizon", "experts", "rank"),
        "up_bias": ("layers", "horizon", "experts"),
    }

    def __init__(self, model: Model, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(model, tensors["reliability"])
        # Side by side, so that one look-up serves both.
        self.tables = _by_layer(model, torch.cat([tensors["chosen"], tensors["affinity"]], -1))
        self.popularity = _by_layer(model, tensors["popularity"])
        self.up, self.up_bias = (self._next_layers(model, tensors[name]) for name in ("up", "up_bias"))
        self._history: Tensor | None = None

    @classmethod
    def of_tensors(cls, model: Model, tensors: Mapping[str, Tensor]) -> "HistoryPredictor":
        """Make one of a file's tensors."""
        return cls(model, tensors)

    def predict(self, index: int, h: Tensor, routing: Routing) -> list[Tensor]:
        """Rank by what followed such choices in training; see `Predictor.predict`."""
        if index == self.layers - 1:
            return []
        chosen, affinity = F.embedding(routing.experts, self.tables[index]).sum(1).chunk(2, 1)
        if index > 0:
            assert self._history is not None
            chosen = chosen + self._history
        self._history = chosen
        state = F.silu(chosen + affinity + self.popularity[index])
        return self._ranked(F.linear(state, self.up[index], self.up_bias[index]))


KINDS: dict[str, type[Predictor]] = {kind.KIND: kind for kind in (HistoryPredictor, GatePredictor, LearnedPredictor)}


def _by_layer(model: Model, weights: Tensor) -> list[Tensor]:
    """Return each layer's weights, on the model's device and in its dtype."""
    return list(weights.to(model.device, model.dtype).unbind(0))


def default_width(config: ModelConfig) -> int:
    """Return how many experts a predictor names: the router's top_k and half as many more."""
    return min(config.top_k + max(1, config.top_k // 2), config.num_experts)


def typical_reliability(config: ModelConfig) -> Tensor:
    """Return what is assumed of the gate where nothing was measured, in the shape of `Predictor.reliability`."""
    layers, width = len(config.moe_layers), default_width(config)
    reliability = torch.zeros(HORIZON, layers, width)
    for ahead, typical in enumerate(TYPICAL_RELIABILITY, start=1):
        ranks = [typical[min(rank * 4 // config.top_k, len(typical) - 1)] for rank in range(width)]
        reliability[ahead - 1, : max(0, layers - ahead)] = torch.tensor(ranks)
    return reliability


def save_predictor(path: Path, kind: str, fingerprint: str, tensors: Mapping[str, Tensor]) -> None:
    """Write a predictor's file; one of that name is replaced at once or not at all.

    Raises:
        InputError: when it cannot be written.
    """
    save_tensors(path, tensors, {"format": FORMAT, "kind": kind, "fingerprint": fingerprint})


def load_predictor(path: Path, model: Model, fingerprint: str) -> Predictor:
    """Read a predictor; its weights go to the model's device.

    Args:
        path: of its file.
        model: the model it is to predict.
        fingerprint: of that model (`LLM.fingerprint`).

    Raises:
        InputError: when the file is not a predictor, is damaged, or belongs to another model.
    """
    metadata = FILE.metadata(path)
    kind = KINDS.get(metadata.get("kind", ""))
    if kind is None:
        raise InputError(f"{path}: not a predictor of a known kind; {FILE.remedy}")
    if metadata.get("fingerprint") != fingerprint:
        raise InputError(
            f"{path}: a predictor of another model; train one for this model with python -m duomoe.train_predictor"
        )
    c = model.config
    sizes = {"layers": len(c.moe_layers), "experts": c.num_experts, "hidden": c.hidden_size}
    tensors = FILE.load(path, {name: TensorSchema(FLOATS, dims) for name, dims in kind.SHAPES.items()}, sizes)
    horizon, _, width = tensors["reliability"].shape
    if not (1 <= horizon <= HORIZON and c.top_k <= width <= c.num_experts):
        raise FILE.damaged(path, "reliability does not fit the model")
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise FILE.damaged(path, f"{name} holds NaN or infinity")
    return kind.of_tensors(model, tensors)
