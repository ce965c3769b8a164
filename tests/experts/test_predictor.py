"""Predictors: what they say, against transformers' routers and plain Python, and which files they refuse."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from duomoe import LLM, InputError
from duomoe.experts.predictor import (
    GatePredictor,
    HistoryPredictor,
    LearnedPredictor,
    Predictor,
    load_predictor,
    save_predictor,
)
from duomoe.models import Model, Routing

LAYERS, EXPERTS, TOP_K, HIDDEN = 4, 8, 3, 48
HORIZON, WIDTH, RANK = 3, 5, 6


@pytest.fixture(scope="module")
def llm(tiny: Callable[..., Any]) -> LLM:
    # Five layers, of which the second is dense: MoE layers are counted among themselves.
    return LLM(tiny("qwen3_moe", num_hidden_layers=5, mlp_only_layers=[1]).path, device="cpu")


@pytest.fixture(scope="module")
def model(llm: LLM) -> Model:
    return llm.policy.model


def weights(kind: str, horizon: int = HORIZON) -> dict[str, Tensor]:
    """Return random tensors of a predictor's file."""
    torch.manual_seed(1)
    shapes: dict[str, tuple[int, ...]] = {"reliability": (horizon, LAYERS, WIDTH)}
    up = {"up": (LAYERS, horizon, EXPERTS, RANK), "up_bias": (LAYERS, horizon, EXPERTS)}
    if kind == "learned":
        shapes |= {"down": (LAYERS, RANK, HIDDEN), "down_bias": (LAYERS, RANK)} | up
        shapes |= {"again": (LAYERS, EXPERTS, HIDDEN)}
        shapes |= {f"again_{name}": (LAYERS, EXPERTS) for name in ("share", "chosen", "bias")}
    if kind == "history":
        shapes |= {"chosen": (LAYERS, EXPERTS, RANK), "affinity": (LAYERS, EXPERTS, RANK)}
        shapes |= {"popularity": (LAYERS, RANK)} | up
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def make(model: Model, kind: str) -> Predictor:
    kinds = {"gate": GatePredictor, "learned": LearnedPredictor, "history": HistoryPredictor}
    return kinds[kind].of_tensors(model, weights(kind))


def step(tokens: int, seed: int = 0) -> list[tuple[Tensor, Routing]]:
    """Return the router's input and choice of each layer of a decode step."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(LAYERS):
        chosen = torch.stack([torch.randperm(EXPERTS, generator=draw)[:TOP_K] for _ in range(tokens)])
        h = torch.randn(tokens, HIDDEN, generator=draw)
        found.append((h, Routing(torch.full((tokens, TOP_K), 1 / TOP_K), chosen.int())))
    return found


def best(scores: list[float], width: int = WIDTH) -> list[int]:
    return sorted(range(EXPERTS), key=lambda expert: (-scores[expert], expert))[:width]


def silu(values: Tensor) -> Tensor:
    return values / (1 + (-values).exp())


def expected(kind: str, model: Model, token: list[tuple[Tensor, list[int]]], index: int, ahead: int) -> list[int]:
    """Return what a predictor should name for one token, written the long way."""
    w = weights(kind)
    h, chosen = token[index]
    router = model.blocks[model.config.moe_layers[index + ahead]].router
    assert router is not None
    if kind == "gate":
        return best((router @ h).tolist())
    if kind == "learned":
        state = silu(w["down"][index] @ h + w["down_bias"][index])
        scores = router @ h
    else:
        sums = w["popularity"][index].clone()
        for layer in range(index + 1):
            for expert in token[layer][1]:
                sums += w["chosen"][layer, expert]
        for expert in chosen:
            sums += w["affinity"][index, expert]
        state, scores = silu(sums), torch.zeros(EXPERTS)
    scores = scores + w["up"][index, ahead - 1] @ state + w["up_bias"][index, ahead - 1]
    return best(scores.tolist())


@pytest.mark.parametrize("kind", ["gate", "learned", "history"])
def test_predictions_are_those_of_the_formula(model: Model, kind: str) -> None:
    predictor = make(model, kind)
    assert (predictor.horizon, predictor.width) == (HORIZON, WIDTH)
    # A step must not remember the one before, and may have another number of tokens.
    for tokens, seed in ((3, 0), (1, 1), (1, 2)):
        inputs = step(tokens, seed)
        for index, (h, routing) in enumerate(inputs):
            named = predictor.predict(index, h, routing)
            assert len(named) == min(HORIZON, LAYERS - 1 - index)
            for ahead, experts in enumerate(named, start=1):
                assert experts.dtype == torch.int32 and experts.is_contiguous()
                for token in range(tokens):
                    seen = [(h[token], routing.experts[token].tolist()) for h, routing in inputs]
                    assert experts[token].tolist() == expected(kind, model, seen, index, ahead), (index, ahead)


def test_the_forecast_of_the_next_steps_is_that_of_the_formula(model: Model) -> None:
    w, predictor = weights("learned"), make(model, "learned")
    use = torch.randint(1, 65536, (LAYERS, EXPERTS), dtype=torch.int32)
    predictor.start(use)
    share = [[value / 65536 for value in layer] for layer in use.tolist()]
    # One after the other, of several tokens, with padding, and with nothing else.
    for seed, (tokens, padding) in enumerate([(1, 0), (3, 0), (2, 2), (0, 2), (1, 3)]):
        for index, (h, routing) in enumerate(step(tokens + padding, seed)):
            h = h / HIDDEN**0.5
            routing.experts[tokens:] = -1
            found = predictor.next_use(index, h, routing)
            choices = [set(chosen) for chosen in routing.experts[:tokens].tolist()]
            unneeded = [1.0] * EXPERTS
            for expert in range(EXPERTS):
                if tokens:
                    part = sum(expert in chosen for chosen in choices) / tokens
                    share[index][expert] += (part - share[index][expert]) / 32
                known = share[index][expert]
                clamped = min(max(known, 1e-3), 1 - 1e-3)
                for token, chosen in enumerate(choices):
                    logit = float(w["again"][index, expert] @ h[token]) + float(w["again_bias"][index, expert])
                    logit += float(w["again_share"][index, expert]) * math.log(clamped / (1 - clamped))
                    logit += float(w["again_chosen"][index, expert]) * (expert in chosen)
                    unneeded[expert] *= 1 - (known + 1 / (1 + math.exp(-logit))) / 2
            assert found is not None and found.dtype == torch.int32 and found.shape == (EXPERTS,)
            assert found.tolist() == pytest.approx([65536 * (1 - p) for p in unneeded], abs=2)


@pytest.mark.parametrize("kind", ["gate", "history"])
def test_who_does_not_forecast(model: Model, kind: str) -> None:
    predictor = make(model, kind)
    predictor.start(torch.zeros(LAYERS, EXPERTS, dtype=torch.int32))
    assert predictor.next_use(0, *step(1)[0]) is None


def test_of_equals_the_lower_expert_comes_first(model: Model) -> None:
    (experts, *_) = GatePredictor(model).predict(0, torch.zeros(2, HIDDEN), step(2)[0][1])
    assert experts.tolist() == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize("kind", ["gate", "learned", "history"])
def test_predict_never_looks_at_values_on_the_host(model: Model, kind: str) -> None:
    """Fake tensors have no values: .item(), nonzero and shapes that depend on data fail on them."""
    predictor, inputs = make(model, kind), step(2)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for index, (h, routing) in enumerate(inputs):
            fake = Routing(*(mode.from_tensor(tensor) for tensor in routing))
            named = predictor.predict(index, mode.from_tensor(h), fake)
            assert all(experts.shape == (2, WIDTH) for experts in named)
            predictor.next_use(index, mode.from_tensor(h), fake)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["gate", "learned", "history"])
def test_a_cuda_graph_predicts_the_same(tiny: Callable[..., Any], kind: str) -> None:
    path = tiny("qwen3_moe", num_hidden_layers=5, mlp_only_layers=[1]).path
    llm = LLM(path, device="cuda", dtype="float32", compile="off")
    predictor = make(llm.policy.model, kind)
    inputs = [(h.cuda(), Routing(*(tensor.cuda() for tensor in routing))) for h, routing in step(3)]

    def whole_step() -> list[Tensor]:
        return [experts for index, (h, r) in enumerate(inputs) for experts in predictor.predict(index, h, r)]

    with torch.inference_mode():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            whole_step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = whole_step()
        for (h, routing), (new_h, new_routing) in zip(inputs, step(3, seed=7), strict=True):
            h.copy_(new_h)
            routing.experts.copy_(new_routing.experts)
        graph.replay()
        assert [experts.tolist() for experts in captured] == [experts.tolist() for experts in whole_step()]


def test_the_gates_typical_reliability(model: Model) -> None:
    predictor = GatePredictor(model)
    assert predictor.reliability.shape == (3, LAYERS, 4) and predictor.width == 4
    for ahead in (1, 2, 3):
        for index in range(LAYERS):
            chances = predictor.reliability[ahead - 1, index].tolist()
            if index + ahead < LAYERS:
                assert 1 > chances[0] > chances[-1] > 0
                assert chances == sorted(chances, reverse=True)
            else:
                assert chances == [0] * 4


@pytest.mark.parametrize("kind", ["gate", "learned", "history"])
def test_a_saved_predictor_is_the_same(model: Model, tmp_path: Path, kind: str) -> None:
    save_predictor(tmp_path / "p", kind, "abc", weights(kind))
    loaded, made = load_predictor(tmp_path / "p", model, "abc"), make(model, kind)
    assert type(loaded) is type(made) and torch.equal(loaded.reliability, made.reliability)
    for index, (h, routing) in enumerate(step(2)):
        for one, other in zip(loaded.predict(index, h, routing), made.predict(index, h, routing), strict=True):
            assert torch.equal(one, other)
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_a_shorter_horizon_and_a_wider_prediction(model: Model, tmp_path: Path) -> None:
    save_predictor(tmp_path / "p", "learned", "abc", weights("learned", horizon=1))
    predictor = load_predictor(tmp_path / "p", model, "abc")
    assert predictor.horizon == 1
    assert [len(predictor.predict(index, *inputs)) for index, inputs in enumerate(step(1))] == [1, 1, 1, 0]


@pytest.mark.parametrize("content", [b"", b"nonsense" * 20, (2).to_bytes(8, "little") + b"{}"])
def test_a_file_that_is_no_predictor_is_refused(model: Model, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "p").write_bytes(content)
    with pytest.raises(InputError, match="predictor"):
        load_predictor(tmp_path / "p", model, "abc")
    with pytest.raises(InputError, match="predictor"):
        load_predictor(tmp_path / "nowhere", model, "abc")


def test_a_predictor_of_another_model_or_kind_is_refused(model: Model, tmp_path: Path) -> None:
    save_predictor(tmp_path / "p", "gate", "abc", weights("gate"))
    with pytest.raises(InputError, match="another model"):
        load_predictor(tmp_path / "p", model, "abd")
    save_predictor(tmp_path / "p", "oracle", "abc", weights("gate"))
    with pytest.raises(InputError, match="not a predictor"):
        load_predictor(tmp_path / "p", model, "abc")


@pytest.mark.parametrize("kind", ["gate", "learned", "history"])
def test_a_damaged_predictor_is_refused(model: Model, tmp_path: Path, kind: str) -> None:
    """Each tensor in turn is left out, misshapen, not finite, or of the wrong type."""
    for name, whole in weights(kind).items():
        rest = {other: tensor for other, tensor in weights(kind).items() if other != name}
        spoilt = [None, whole[0], whole[:-1], whole.new_full(whole.shape, torch.nan), whole.int()]
        for tensor in spoilt:
            if tensor is not None and (name, kind) == ("reliability", "gate") and tensor.dim() == 3:
                continue  # the gate's only tensor may be narrower, or of a shorter horizon
            save_predictor(tmp_path / "p", kind, "abc", rest if tensor is None else rest | {name: tensor})
            with pytest.raises(
                InputError, match=f"damaged, or a predictor of another model: {name if tensor is None else ''}"
            ):
                load_predictor(tmp_path / "p", model, "abc")


@pytest.mark.parametrize("shape", [(3, 4, 2), (3, 4, 9), (4, 4, 5), (0, 4, 5)])
def test_a_width_or_horizon_out_of_range_is_refused(model: Model, tmp_path: Path, shape: tuple[int, ...]) -> None:
    save_predictor(tmp_path / "p", "gate", "abc", {"reliability": torch.zeros(shape)})
    with pytest.raises(InputError, match="damaged"):
        load_predictor(tmp_path / "p", model, "abc")
