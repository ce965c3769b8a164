"""The memory plan: that it divides what there is, keeps to it, and that what is really allocated is what it says."""

import gc
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from duomoe import LLM, EngineConfig, InputError, SamplingParams
from duomoe.engine import engine
from duomoe.experts.compute import EXPANDED_PAIRS
from duomoe.experts.format import int4_format, packed_format, plain_format
from duomoe.experts.policies import BOUNDED
from duomoe.experts.policies.lru import Lru
from duomoe.kernels import expand
from duomoe.memory.kv_cache import PAGE_SIZE
from duomoe.memory.plan import CHUNK_TOKENS, MIB, Limits, Plan, check_host, cuda_reserved, host_memory, make_plan
from duomoe.models import Architecture, ModelConfig, Routing, architecture_of
from duomoe.models.model import expected_tensors

QWEN3_30B = dict(
    model_type="qwen3_moe", hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=48,
    num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
    vocab_size=151936, max_position_embeddings=40960, norm_topk_prob=True, torch_dtype="bfloat16",
)  # fmt: skip
HUGE = 1 << 50


def limits_of(**changes: Any) -> Limits:
    free = Limits("cpu", "auto", None, "--gpu-memory", HUGE, None, None, 8)
    return replace(free, **changes)


def plan_of(raw: dict[str, Any], **changes: Any) -> Plan:
    architecture = architecture_of(raw)
    model = architecture.parse(raw)
    plain = plain_format(model.hidden_size, model.moe_intermediate_size, model.dtype)
    plan = make_plan(architecture, model, model.dtype, plain, 0, limits_of(**changes))
    check_host(plan)
    return plan


@st.composite
def models(draw: st.DrawFn) -> tuple[Architecture, ModelConfig]:
    def size(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    family = draw(st.sampled_from(["mixtral", "qwen2_moe", "qwen3_moe"]))
    heads, experts = 2 ** size(0, 5), size(1, 40)
    raw = dict(
        model_type=family, hidden_size=8 * size(1, 300), intermediate_size=size(1, 4000), num_hidden_layers=size(1, 6),
        num_attention_heads=heads, num_key_value_heads=2 ** size(0, heads.bit_length() - 1), head_dim=2 * size(1, 64),
        num_local_experts=experts, num_experts_per_tok=size(1, experts), vocab_size=size(1, 40000),
        max_position_embeddings=size(1, 50000), tie_word_embeddings=draw(st.booleans()), torch_dtype="bfloat16",
    )  # fmt: skip
    if family != "mixtral":
        raw |= dict(moe_intermediate_size=size(1, 2000), mlp_only_layers=draw(st.lists(st.integers(0, 5))))
        raw |= dict(shared_expert_intermediate_size=size(1, 4000))
    architecture = architecture_of(raw)
    return architecture, architecture.parse(raw)


@given(
    found=models(),
    device=st.sampled_from(["cpu", "cuda"]),
    policy=st.sampled_from(["auto", "resident", *BOUNDED]),
    memory=st.one_of(st.none(), st.floats(0, 37).map(lambda power: int(2**power))),
    experts=st.one_of(st.none(), st.fractions(Fraction(1, 1000), 1), st.floats(0, 34).map(lambda power: int(2**power))),
    length=st.one_of(st.none(), st.integers(1, 60000)),
    batch=st.integers(1, 40),
    packed=st.booleans(),
)
@settings(max_examples=500, deadline=None)
def test_any_model_and_any_limits(
    found: tuple[Architecture, ModelConfig],
    packed: bool,
    device: str,
    policy: str,
    memory: int | None,
    experts: int | Fraction | None,
    length: int | None,
    batch: int,
) -> None:
    architecture, model = found
    asked = limits_of(
        device=device, policy=policy, memory=memory, experts=experts, max_model_len=length, max_batch=batch
    )

    size = model.hidden_size, model.moe_intermediate_size
    plain, smaller = plain_format(*size, torch.bfloat16), packed_format(*size)
    packed &= smaller.row_bytes < plain.row_bytes

    def plan_in(memory: int | None) -> Plan:
        limits = replace(asked, memory=memory)
        return make_plan(architecture, model, torch.bfloat16, smaller if packed else plain, 0, limits)

    try:
        plan = plan_in(memory)
    except InputError as error:
        if not (least := re.search(r"at least (\d+) bytes \(.*are needed: weights", str(error))):
            assert experts is not None and "--expert-memory" in str(error)
            return
        # The minimum that it names does, and a byte less does not.
        with pytest.raises(InputError, match="too little"):
            plan_in(int(least[1]) - 1)
        plan = plan_in(int(least[1]))

    everything = len(model.moe_layers) * model.num_experts
    assert plan.budget is None or plan.total <= plan.budget
    fixed = plan.weights_bytes + plan.predictor_bytes + plan.workspace_bytes + plan.decode_bytes
    by_sequence = plan.kv_bytes + plan.page_routing_bytes + plan.sequences_bytes
    assert plan.total == fixed + by_sequence + plan.slot_bytes + plan.allocator_bytes
    # One sequence has pages; nobody gets more than there is to hold.
    assert plan.max_model_len <= min(length or model.max_position, model.max_position)
    assert plan.max_model_len <= plan.num_pages * PAGE_SIZE < batch * (plan.max_model_len + PAGE_SIZE)
    assert plan.pass_tokens >= plan.max_model_len
    if length is not None:
        assert plan.max_model_len == min(length, model.max_position)
    assert min(1, everything) <= plan.num_slots <= everything
    assert plan.row_bytes == (smaller if packed and plan.policy != "resident" else plain).row_bytes
    if policy != "auto" or plan.num_slots < everything:
        assert (plan.policy == "resident") == (policy == "resident")
    elif plan.policy != "resident":  # where that would be too large
        resident = replace(plan, policy="resident", expert_format=plain)
        over_budget = plan.budget is not None and resident.total > plan.budget
        assert over_budget or (isinstance(experts, int) and resident.slot_bytes > experts)
    if isinstance(experts, Fraction):
        assert plan.num_slots <= experts * everything
    elif experts is not None:
        assert plan.slot_bytes <= experts
    # Nothing is left that an expert could have had.
    if plan.budget is not None and experts is None and plan.policy not in ("resident", "on_demand"):
        more = replace(plan, num_slots=plan.num_slots + 1)
        assert plan.num_slots in (everything - 1, everything) or more.total > plan.budget
    assert plan.table().count("\n") >= 5 and json.loads(json.dumps(plan.as_dict()))["total_bytes"] == plan.total


@given(models())
@settings(max_examples=50, deadline=None)
def test_weights_are_all_tensors_that_are_no_experts(found: tuple[Architecture, ModelConfig]) -> None:
    architecture, model = found
    others = [shape for name, shape in expected_tensors(architecture, model) if ".experts." not in name]
    plain = plain_format(model.hidden_size, model.moe_intermediate_size, torch.bfloat16)
    plan = make_plan(architecture, model, torch.bfloat16, plain, 0, limits_of())
    assert plan.weights_bytes == 2 * sum(math.prod(shape) for shape in others)


def test_more_memory_goes_to_context_within_its_share_and_then_to_experts() -> None:
    plans = [plan_of(QWEN3_30B, device="cuda", memory=gib << 30) for gib in (6, 8, 12, 24, 48, 72, 100)]
    slots, lengths = [plan.num_slots for plan in plans], [plan.max_model_len for plan in plans]
    assert slots == sorted(slots) and lengths == sorted(lengths) and lengths[-1] == 40960
    for plan in plans:
        if plan.policy == "duo":
            # A quarter, and the least plan's context, which is small.
            context = plan.kv_bytes + plan.workspace_bytes
            assert plan.budget is not None and context <= (plan.budget - plan.weights_bytes) / 4 + 400 * MIB
    assert plans[-1].policy == "resident" and plans[-1].num_pages == 8 * 40960 / 16
    # Where all experts fit beside one sequence of full length, they are not given up for more sequences.
    assert plans[-2].policy == "resident" and plans[-2].num_pages < 8 * 40960 / 16


def test_a_stated_length_is_kept() -> None:
    assert plan_of(QWEN3_30B, device="cuda", memory=24 << 30).max_model_len < 40960
    stated = plan_of(QWEN3_30B, device="cuda", memory=24 << 30, max_model_len=40960, max_batch=2)
    assert stated.max_model_len == 40960 and stated.num_pages == 2 * 40960 / 16
    with pytest.raises(InputError, match=r"KV pages for 40960 tokens 3\.75 GiB"):
        plan_of(QWEN3_30B, device="cuda", memory=8 << 30, max_model_len=40960)


def test_a_share_of_the_experts() -> None:
    for percent in (1, 15, 29, 58, 100):  # 0.29 * 100 is less than 29 in floating point
        plan = plan_of(QWEN3_30B, experts=Fraction(percent, 100))
        assert plan.num_slots == 6144 * percent // 100
    assert plan_of(QWEN3_30B, experts=Fraction(1)).policy == "resident"


def test_where_all_experts_may_stay_the_budget_decides_how() -> None:
    architecture = architecture_of(QWEN3_30B)
    model = architecture.parse(QWEN3_30B)
    packed = packed_format(model.hidden_size, model.moe_intermediate_size)
    for experts in (None, Fraction(1), 60 << 30):
        for gib, policy, name in ((48, "duo", "bf16-packed"), (70, "resident", "plain")):
            limits = limits_of(
                device="cuda", memory=gib << 30, experts=experts, max_model_len=8192, max_batch=2, graphs=True
            )
            plan = make_plan(architecture, model, model.dtype, packed, 0, limits)
            assert (plan.policy, plan.num_slots, plan.expert_format.name) == (policy, 6144, name)


def test_memory_to_expand_quantised_experts_never_costs_a_slot() -> None:
    architecture = architecture_of(QWEN3_30B)
    model = architecture.parse(QWEN3_30B)
    int4 = int4_format(model.hidden_size, model.moe_intermediate_size, 128, torch.float16)

    def plan_in(memory: int) -> Plan:
        limits = limits_of(device="cuda", memory=memory, max_model_len=16384, max_batch=1)
        return make_plan(architecture, model, model.dtype, int4, 0, limits)

    roomy = plan_in(40 << 30)
    assert roomy.policy == "resident" and roomy.expands_quantised
    assert roomy.workspace()["expanded experts"] == 14 * 3 * 2048 * 768 * 2
    tight = plan_in(replace(roomy, expands_quantised=False).total)
    assert tight.policy == "resident" and not tight.expands_quantised
    assert tight.workspace()["expanded experts"] == 0


def test_the_ring_is_that_of_the_prefill(tiny: Callable[..., Any]) -> None:
    for slots in range(1, 25):
        llm = LLM(tiny("qwen3_moe").path, device="cpu", policy="lru", expert_memory=slots * 13824)
        assert isinstance(llm.policy, Lru)
        assert llm.plan.num_slots == slots
        assert llm.policy.stream.ring == llm.plan.ring_slots


def test_the_host_must_hold_the_experts() -> None:
    plan = plan_of(QWEN3_30B, device="cuda", memory=24 << 30, host_memory=60 << 30)
    assert plan.store_bytes == 54 << 30
    with pytest.raises(InputError, match=r"host has 50.00 GiB.*all experts 54.00 GiB"):
        plan_of(QWEN3_30B, device="cuda", memory=24 << 30, host_memory=50 << 30)
    assert plan_of(QWEN3_30B, device="cuda", memory=200 << 30, host_memory=8 << 30).store_bytes == 0
    with pytest.raises(InputError, match=r"expert slots 54\.00 GiB"):
        plan_of(QWEN3_30B, host_memory=50 << 30)


@pytest.mark.parametrize("file", ["memory.max", "memory/memory.limit_in_bytes"])
def test_a_containers_limit_is_the_hosts_memory(file: str, tmp_path: Path) -> None:
    whole = host_memory(tmp_path)
    assert whole > 0
    (tmp_path / file).parent.mkdir(exist_ok=True)
    for text, expected in (("1073741824\n", 1 << 30), ("max\n", whole), (f"{1 << 62}\n", whole)):
        (tmp_path / file).write_text(text)
        assert host_memory(tmp_path) == expected


def test_the_plan_reads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint of 57 GB that is a hole in a file: its headers are all there is."""
    architecture = architecture_of(QWEN3_30B)
    header, end = {}, 0
    for name, shape in expected_tensors(architecture, architecture.parse(QWEN3_30B)):
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B))
    monkeypatch.setattr("duomoe.config.host_memory", lambda: 256 << 30)
    plan = EngineConfig(device="cpu", gpu_memory="24GB", expert_memory="15%").plan(tmp_path)
    assert plan.num_slots == 921 and plan.policy == "duo" and plan.weights_bytes + plan.store_bytes == end


def storages(*tensors: torch.Tensor | None) -> int:
    """Add up the bytes of the memory behind some tensors, each once."""
    found = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in tensors
        if tensor is not None
    }
    return sum(found.values())


@pytest.mark.parametrize("memory", [None, "0.99MB", "1.1MB", "3MB"])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_what_is_allocated_is_what_was_planned(
    family: str, memory: str | None, tiny: Callable[..., Any], prompt_of: Callable[..., list[int]]
) -> None:
    path = tiny(family).path
    llm = LLM(path, device="cpu", gpu_memory=memory, max_batch=2, max_model_len=64)
    model, plan = llm.engine.model, llm.plan
    weights = storages(model.embedding, model.final_norm, model.head, *(w for block in model.blocks for w in block))
    pages = storages(*(tensor for layer in llm.engine.cache.layers for tensor in layer))
    slots = (
        storages(llm.policy.lease.pool.rows)  # type: ignore[attr-defined]
        if plan.policy != "resident"
        else storages(*(view for views in llm.policy.weights for view in views.values()))  # type: ignore[attr-defined]
    )
    assert (weights, pages, slots) == (plan.weights_bytes, plan.kv_bytes, plan.slot_bytes)
    routing = getattr(llm.policy, "_page_routing", None)
    assert (0 if routing is None else storages(routing.counts)) == plan.page_routing_bytes
    assert (plan.page_routing_bytes > 0) == (plan.policy == "duo")
    assert llm.engine.decode_step.sequences.num_bytes == plan.sequences_bytes
    others = plan.workspace_bytes + plan.predictor_bytes + plan.page_routing_bytes + plan.sequences_bytes
    assert memory is None or weights + pages + slots + others == plan.total <= float(memory[:-2]) * 1e6
    assert llm.memory.items() <= plan.as_dict().items()
    prompt = prompt_of(40)
    assert llm.generate(prompt, SamplingParams(max_new_tokens=30))[0].token_ids == [
        *LLM(path, device="cpu").generate(prompt, SamplingParams(max_new_tokens=24))[0].token_ids
    ]  # up to 64 tokens in all


class LiveBytes(TorchDispatchMode):
    """Follows the bytes of all tensors that come into being while it is entered, but not those inside a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: dict[int, StorageWeakRef] = {}
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        self.outside = {key: ref for key, ref in self.outside.items() if not ref.expired()}
        for storage in self._storages((args, kwargs)):
            if storage._cdata not in self.live:
                self.outside.setdefault(storage._cdata, StorageWeakRef(storage))
        result = func(*args, **(kwargs or {}))
        for storage in self._storages(result):
            if storage._cdata not in self.outside:
                self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result

    def _storages(self, tree: Any) -> list[torch.UntypedStorage]:
        return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def live_bytes_of_steps(llm: LLM) -> LiveBytes:
    """Follow what the engine's steps allocate, in its thread."""
    step, passes = llm.engine.step, LiveBytes()

    def followed() -> None:
        with passes:
            step()

    llm.engine.step = followed  # type: ignore[method-assign]
    return passes


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_passes_stay_within_the_workspace(
    family: str, tiny: Callable[..., Any], prompt_of: Callable[..., list[int]]
) -> None:
    model = tiny(family, hidden_size=128, head_dim=32, max_position_embeddings=1024, mlp_only_layers=[1])
    few = dict(device="cpu", dtype="bfloat16")
    for options, lengths in (
        (dict(max_model_len=700, max_batch=1), [690]),
        (dict(max_model_len=100, max_batch=9), [90] * 9),
        (dict(max_model_len=17, max_batch=40), [16] * 40),
    ):
        llm = LLM(model.path, **few, **options)
        assert llm.plan.pass_tokens <= CHUNK_TOKENS
        prompts = [prompt_of(length, seed=seed) for seed, length in enumerate(lengths)]
        passes = live_bytes_of_steps(llm)
        llm.generate(prompts, SamplingParams(max_new_tokens=3, temperature=1.0, top_p=0.9))
        assert passes.peak <= llm.plan.workspace_bytes
        assert passes.peak >= llm.plan.workspace_bytes / 3  # nor is it so large that it says nothing


@pytest.mark.parametrize(
    "options", [dict(expert_dtype="bf16-packed", policy="lru", expert_memory="50%"), dict(expert_dtype="int4")]
)
def test_expanded_experts_have_room_in_the_workspace(
    options: dict[str, Any],
    tiny: Callable[..., Any],
    prompt_of: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(EXPANDED_PAIRS, "int4", 16)
    monkeypatch.setattr("duomoe.experts.compute.EXPANDED_BYTES", 400_000)
    expanded: list[int] = []
    monkeypatch.setattr("duomoe.experts.compute.expand", lambda *args: expanded.append(args[6].nbytes) or expand(*args))
    model = tiny("qwen3_moe", hidden_size=128, moe_intermediate_size=96)
    llm = LLM(model.path, device="cpu", dtype="bfloat16", max_model_len=128, max_batch=1, **options)
    passes = live_bytes_of_steps(llm)
    llm.generate(prompt_of(120), SamplingParams(max_new_tokens=2))
    assert expanded and passes.peak <= llm.plan.workspace_bytes
    part = llm.plan.workspace()["expanded experts"]
    assert part == 5 * 3 * 128 * 96 * 2 and sum(expanded[:2]) == part


def test_each_part_of_the_workspace_holds_what_it_is_for(
    tiny: Callable[..., Any], prompt_of: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = dict(hidden_size=64, head_dim=32, vocab_size=6000, mlp_only_layers=[1], intermediate_size=400)
    sizes |= dict(shared_expert_intermediate_size=200, moe_intermediate_size=100, max_position_embeddings=512)
    llm = LLM(tiny("qwen2_moe", **sizes).path, device="cpu", dtype="bfloat16", max_batch=4)
    peaks: dict[str, int] = {}

    def watch(owner: Any, name: str) -> None:
        inner = getattr(owner, name)

        def outer(*args: Any) -> Any:
            with LiveBytes() as inside:
                result = inner(*args)
            peaks[name] = max(peaks.get(name, 0), inside.peak)
            return result

        setattr(owner, name, outer)

    model = llm.engine.model
    step = llm.engine.decode_step
    for owner, name in ((engine, "batch_of"), (step, "_sample"), (llm.policy, "experts"), (model, "before")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # so that it is put back
        watch(owner, name)
    watch(model, "after")
    prompts = [prompt_of(500, seed=seed) for seed in range(4)]
    llm.generate(prompts, SamplingParams(max_new_tokens=2, temperature=1.0, top_p=0.9, presence_penalty=1, logprobs=1))
    parts = llm.plan.workspace()
    for name, *allowed in (
        ("batch_of", "positions"),
        ("before", "attention", "routing"),
        ("experts", "expert outputs", "experts"),
        ("after", "MLP"),
        ("_sample", "logits"),
    ):
        bound = sum(parts[part] for part in allowed)
        assert bound / 2 <= peaks[name] <= bound, name


def test_few_tokens_have_room_for_their_partial_sums(tiny: Callable[..., Any]) -> None:
    model = tiny("qwen3_moe", hidden_size=512, num_experts=8, num_experts_per_tok=4)
    llm = LLM(model.path, device="cpu", max_model_len=2, max_batch=1)
    parts = llm.plan.workspace()
    h, weights, experts = torch.zeros(2, 512), torch.ones(2, 4), torch.arange(8, dtype=torch.int32).view(2, 4)
    with LiveBytes() as inside:
        routings = [Routing(weights, experts)]
        total = llm.policy.layer_sum([h], routings)
        llm.policy.experts(0, total, [h], routings)
        total.totals()
    assert parts["decode experts"] / 2 <= inside.peak <= parts["decode experts"] + parts["experts"]


class Allocator:
    """A plain model of torch's: segments with free pieces, of which the smallest that fits is split."""

    def __init__(self) -> None:
        self.free: dict[int, list[int]] = {2 * MIB: [], 20 * MIB: []}
        self.reserved = 0

    def allocate(self, size: int) -> None:
        size = -(-size // 512) * 512
        if size >= 10 * MIB:
            self.reserved += -(-size // (2 * MIB)) * 2 * MIB
            return
        segment = 2 * MIB if size <= MIB else 20 * MIB
        pieces = self.free[segment]
        fitting = [piece for piece in pieces if piece >= size]
        if fitting:
            pieces.remove(min(fitting))
        else:
            self.reserved += segment
        rest = (min(fitting) if fitting else segment) - size
        if rest >= (512 if segment == 2 * MIB else MIB + 1):
            pieces.append(rest)


@given(st.lists(st.one_of(st.integers(1, MIB), st.integers(1, 10 * MIB), st.integers(1, 40 * MIB)), max_size=60))
@example([7 * MIB] * 30)
@example([700 << 10] * 30)
@settings(max_examples=300, deadline=None)
def test_what_cuda_reserves_is_bounded(sizes: list[int]) -> None:
    allocator = Allocator()
    for size in sizes:
        allocator.allocate(size)
    assert allocator.reserved <= cuda_reserved(sizes) <= max(2 * allocator.reserved, allocator.reserved + 44 * MIB)


@pytest.mark.gpu
@pytest.mark.parametrize(("compiled", "expert_dtype"), [("off", "plain"), ("on", "auto"), ("off", "bf16-packed")])
@pytest.mark.parametrize(
    ("family", "memory", "experts", "sizes"),
    [
        ("mixtral", "160MiB", None, dict(hidden_size=128, intermediate_size=96)),
        ("qwen2_moe", "160MiB", "30%", dict(hidden_size=128, moe_intermediate_size=96)),
        ("qwen3_moe", "160MiB", "10%", dict(hidden_size=128, moe_intermediate_size=96)),
        (
            "qwen3_moe",
            "600MiB",
            None,
            dict(
                hidden_size=1024, moe_intermediate_size=512, num_experts=32, num_experts_per_tok=4, vocab_size=32000,
                num_attention_heads=16, head_dim=64, num_hidden_layers=4, max_position_embeddings=6000,
            ),
        ),
    ],
)  # fmt: skip
def test_a_gpu_never_holds_more(
    family: str,
    memory: str,
    experts: str | None,
    sizes: dict[str, int],
    compiled: str,
    expert_dtype: str,
    tiny: Callable[..., Any],
    prompt_of: Callable[..., list[int]],
) -> None:
    path = tiny(family, **sizes).path
    gc.collect()
    torch.cuda.empty_cache()
    others = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    llm = LLM(
        path, device="cuda", dtype="bfloat16", gpu_memory=memory, expert_memory=experts, compile=compiled,
        expert_dtype=expert_dtype,
    )  # fmt: skip
    assert llm.plan.budget is not None and llm.plan.total <= llm.plan.budget
    longest = llm.max_model_len
    params = SamplingParams(max_new_tokens=4, temperature=1.0, top_p=0.9)
    for lengths in ([longest - 4], [longest // 8 - 4] * 8, [1], [longest // 3] * 3, [longest - 4, 7]):
        llm.generate([prompt_of(length, seed=seed) for seed, length in enumerate(lengths)], params)
    assert torch.cuda.max_memory_reserved() - others <= llm.plan.total
