"""Who gives up its slot: hit rates of decode on a recorded trace, of the replay and of the kernels' references."""

import pytest
import torch
from torch import Tensor

from duomoe import LLM, SamplingParams
from duomoe.experts.policies.duo import Duo
from duomoe.experts.predictor import load_predictor
from duomoe.experts.replay import Decodes, Rule, decodes_of, forecasts, replay
from duomoe.experts.slots import Directory
from duomoe.experts.trace import Recorder, Trace
from duomoe.kernels import admit
from duomoe.llm import EMBEDDED_MODEL
from duomoe.models import Routing

# None of them is the model's training text.
TEXTS = (
    "The ferry left the island before noon, and nobody on the quay could say why the captain was in such haste. "
    "Two women waved. The gulls went after it as far as the lighthouse, and then turned back.",
    "def moving_median(values, window):\n    ordered = sorted(values[:window])\n    for at in range(window):",
    "Members of the committee, the year that lies behind us has asked much of our harbours and roads, and",
    "static int read_block(struct device *dev, unsigned long sector, void *buffer)\n{\n\tint err;\n\n\tif (!buffer)",
    "The option sets how many connections the server keeps open while it is idle. The default is eight. If the value",
    "Enter two servants with a table.\nFIRST SERVANT. Where is the key? I had it but this morning.\nSECOND SERVANT.",
)
RULES: tuple[Rule, ...] = ("lru", "average", "forecast", "belady")


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def trace(llm: LLM) -> Trace:
    recorder = Recorder(len(llm.config.moe_layers), with_hidden=True)
    llm.policy.observer = recorder.observe
    for number, text in enumerate(TEXTS):
        recorder.begin()
        sampling = SamplingParams(max_new_tokens=30 + number, temperature=0.8, seed=number, ignore_eos=True)
        llm.generate(text, sampling)
    llm.policy.observer = None
    return recorder.trace(llm.fingerprint(), llm.config.num_experts)


@pytest.fixture(scope="module")
def decodes(trace: Trace) -> Decodes:
    return decodes_of(trace)


@pytest.fixture(scope="module")
def forecast(llm: LLM, decodes: Decodes) -> Tensor:
    predictor = load_predictor(EMBEDDED_MODEL / "predictor.safetensors", llm.policy.model, llm.fingerprint())
    found = forecasts(predictor, decodes, torch.float32)
    assert found is not None
    return found


def hits_of_admit(decodes: Decodes, num_slots: int, rule: Rule, forecast: Tensor) -> int:
    """Return the hits that `admit` counts over directories, one for each request."""
    _, _, layers, top_k = decodes.experts.shape
    num_experts = decodes.use.shape[2]
    counts = torch.zeros(3, dtype=torch.int64)
    for row, steps in enumerate(decodes.steps):
        state = Directory(layers, num_experts, num_slots, torch.device("cpu"))
        state.use.copy_(decodes.use[row])
        use = decodes.use[row].flatten().tolist()
        ranked = sorted(range(len(use)), key=lambda owner: -use[owner])
        for slot, owner in enumerate(reversed(ranked[:num_slots])):
            state.owner_of[slot], state.slot_of.view(-1)[owner] = owner, slot
        pending = torch.zeros(num_experts, dtype=torch.int32)
        slots = torch.empty(2, num_experts, dtype=torch.int32)
        misses = torch.empty(3, top_k, dtype=torch.int32)
        for step in range(steps):
            for layer in range(layers):
                experts = decodes.experts[row, step, layer, None].int().contiguous()
                admit(experts, layer, True, rule != "lru", 0, pending, *state.tensors, counts, slots, misses)
                if rule == "forecast":
                    state.use[layer] = forecast[row, step, layer]
    assert int(counts.sum()) == sum(decodes.steps) * layers * top_k
    return int(counts[0])


@pytest.mark.parametrize("percent", [10, 15, 25, 50])
def test_hit_rates(decodes: Decodes, forecast: Tensor, percent: int) -> None:
    """LRU, the average, the forecast and Belady's optimum, in that order; and the replay counts what `admit` counts."""
    num_slots = round(8 * 32 * percent / 100)
    hits = {rule: replay(decodes, num_slots, rule, forecast) for rule in RULES}
    for rule in ("lru", "average", "forecast"):
        assert hits[rule] == hits_of_admit(decodes, num_slots, rule, forecast), rule
    # The forecast is what decode goes by. It gains more over the average the fewer slots there are.
    assert hits["lru"] < hits["average"] < hits["forecast"] < hits["belady"], hits


def test_belady_is_the_best_that_can_be() -> None:
    """Against all choices there are, on small random traces."""
    for seed in range(5):
        draw = torch.Generator().manual_seed(seed)
        layers, num_experts, num_slots = 2, 3, 2
        experts = torch.randint(num_experts, (1, 5, layers, 1), generator=draw)
        use = torch.randint(65536, (1, layers, num_experts), dtype=torch.int32, generator=draw)
        needed = [layer * num_experts + int(experts[0, step, layer]) for step in range(5) for layer in range(layers)]
        start = sorted(range(layers * num_experts), key=lambda owner: -int(use.flatten()[owner]))[:num_slots]

        def best(there: frozenset[int], rest: list[int]) -> int:
            if not rest:
                return 0
            now, rest = rest[0], rest[1:]
            if now in there:
                return 1 + best(there, rest)
            return max(best(there - {victim} | {now}, rest) for victim in there)

        assert replay(Decodes([5], experts, use, None), num_slots, "belady") == best(frozenset(start), needed)


def test_requests_of_unlike_length(decodes: Decodes, forecast: Tensor) -> None:
    """Side by side they count what each counts alone."""
    for rule in RULES:
        alone = 0
        for row, length in enumerate(decodes.steps):
            one = Decodes([length], decodes.experts[row, None, :length], decodes.use[row, None], None)
            alone += replay(one, 38, rule, forecast[row, None])
        assert alone == replay(decodes, 38, rule, forecast)


def test_what_a_trace_gives(trace: Trace, decodes: Decodes) -> None:
    assert decodes.steps == sorted((29 + number for number in range(len(TEXTS))), reverse=True)
    last = trace.request == len(TEXTS) - 1  # the longest
    prompt = trace.experts[last & ~trace.decode][:, 3]
    assert torch.equal(decodes.experts[0], trace.experts[last & trace.decode].long())
    assert bool((decodes.experts[-1, decodes.steps[-1] :] == -1).all())
    share = (int((prompt == 7).sum()) + 1) / (len(prompt) + 32 / 4)
    assert int(decodes.use[0, 3, 7]) == int(share * 65536)


def test_decode_goes_by_the_forecast() -> None:
    """A prefill's use is where the predictor starts, and what it forecasts is what the directory holds."""
    llm = LLM(device="cpu", dtype="float32", policy="duo", expert_memory=64 * 43008)
    policy = llm.policy
    assert isinstance(policy, Duo) and policy.decoder is not None and policy.decoder.predictor is not None
    predictor = policy.decoder.predictor
    forecast, start = predictor.next_use, predictor.start
    last: dict[int, list[int]] = {}
    starts = []

    def next_use(index: int, h: Tensor, routing: Routing) -> Tensor:
        use = forecast(index, h, routing)
        assert use is not None
        last[index] = use.tolist()
        return use

    def begin(use: Tensor) -> None:
        starts.append(use.tolist())
        assert torch.equal(use, policy.directory.use)
        start(use)

    predictor.next_use, predictor.start = next_use, begin  # type: ignore[method-assign]
    for _ in range(2):
        llm.generate(TEXTS[0], SamplingParams(max_new_tokens=4, ignore_eos=True))
        assert policy.directory.use.tolist() == [last[index] for index in range(8)]
    assert len(starts) == 2
