"""Experts of bfloat16 in 12 bits, in host memory, over the link and in slots: the same results, for fewer bytes."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_lossless import Adversary, Counter, Wrong, connect

from duomoe import LLM, EngineConfig, InputError, SamplingParams, generate
from duomoe.experts.decode import Decode
from duomoe.experts.link import HostLink, Pace
from duomoe.experts.policies import BOUNDED
from duomoe.memory.plan import Plan
from duomoe.model_folder import EMBEDDED_MODEL, ModelFolder

HIDDEN, INTERMEDIATE = 128, 96
ROW_BYTES = 2 * 3 * HIDDEN * INTERMEDIATE
# Of gate and up, then of down: 12 bits a value, a byte for each output, and 16 bytes for each patch, of which there may
# be 16 and one for each 1,024 values of a matrix; each in whole 256 bytes.
PACKED_BYTES = (192 * 192 + 256 + 1024) + (128 * 144 + 256 + 512)
UNPACKED = 1  # the layer that does not pack

pytestmark = pytest.mark.filterwarnings("ignore:experts of layer 1 do not pack")

EXPERT = "model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight"


@pytest.fixture(scope="module")
def folder(tiny: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of three layers, one of which has an expert with exponents all over the place, and another some zeros."""
    sizes = dict(hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE, dtype=torch.bfloat16)
    made = Path(tmp_path_factory.mktemp("packed")) / "model"
    shutil.copytree(tiny("qwen3_moe", **sizes).path, made)
    tensors = load_file(made / "model.safetensors")
    scattered = tensors[EXPERT.format(layer=UNPACKED, expert=2, name="up")]
    scattered *= 2.0 ** torch.randint(-60, 1, scattered.shape, generator=torch.Generator().manual_seed(0))
    tensors[EXPERT.format(layer=2, expert=0, name="gate")][3:40] = 0
    tensors[EXPERT.format(layer=2, expert=1, name="down")].view(-1)[::1000] = 1e-30
    save_file(tensors, made / "model.safetensors")
    return made


def packed_llm(folder: Path, slots: int, **options: Any) -> LLM:
    """With memory for so many plain rows."""
    options = dict(device="cpu", expert_memory=slots * ROW_BYTES, policy="duo") | options
    return LLM(folder, expert_dtype="bf16-packed", **options)


@pytest.fixture(scope="module")
def all_pack(tiny: Callable[..., Any]) -> Path:
    sizes = dict(hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE, dtype=torch.bfloat16)
    return Path(tiny("qwen3_moe", **sizes).path)


def test_what_packs_is_packed_and_takes_less_of_a_slot(all_pack: Path) -> None:
    llm = packed_llm(all_pack, 6)
    store = llm.policy.lease.store  # type: ignore[attr-defined]
    assert llm.unpacked_layers == []
    assert [rows.shape for rows in store.layers] == [(8, PACKED_BYTES)] * 3
    slots = 6 * ROW_BYTES // PACKED_BYTES
    assert slots > 6 and llm.plan.num_slots == slots
    assert llm.memory["expert_slots_bytes"] == slots * PACKED_BYTES
    assert llm.memory["expert_store_bytes"] == llm.plan.store_bytes == 24 * PACKED_BYTES


def test_a_layer_that_does_not_pack_stays_plain_and_slots_have_room_for_it(folder: Path) -> None:
    with pytest.warns(RuntimeWarning, match="layer 1 do not pack and stay plain; .* there are 5 instead of 6$"):
        llm = packed_llm(folder, 5)
    store = llm.policy.lease.store  # type: ignore[attr-defined]
    assert llm.unpacked_layers == [UNPACKED]
    assert [rows.shape[1] for rows in store.layers] == [PACKED_BYTES, ROW_BYTES, PACKED_BYTES]
    assert llm.memory["expert_store_bytes"] == 8 * (2 * PACKED_BYTES + ROW_BYTES)
    assert llm.memory["expert_store_bytes"] == llm.plan.store_bytes
    assert llm.plan.num_slots == 5 and llm.memory["expert_slots_bytes"] == 5 * ROW_BYTES


def test_slots_that_have_no_room_for_a_plain_layer_are_refused_in_one_line(folder: Path) -> None:
    with pytest.raises(InputError, match=rf"^--expert-memory: at least [^\n]*{ROW_BYTES} bytes[^\n]*$"):
        packed_llm(folder, 0, expert_memory=PACKED_BYTES)


def same_bits(llm: LLM, whole: LLM, prompt_of: Callable[..., list[int]]) -> None:
    # Three tokens have more pairs than there are experts, so decode steps of the batch expand; one alone does not.
    prompt, batch = prompt_of(50), [prompt_of(length, seed=length) for length in (1, 16, 33)]
    params = SamplingParams(max_new_tokens=8)
    assert torch.equal(llm.logits(prompt), whole.logits(prompt))
    found, expected = llm.generate(batch, params), whole.generate(batch, params)
    assert [completion.token_ids for completion in found] == [completion.token_ids for completion in expected]
    assert torch.equal(llm.logits(prompt), whole.logits(prompt))  # from what the generation has left in the slots


@pytest.mark.parametrize("policy", BOUNDED)
def test_every_policy_gives_the_plain_bits(policy: str, folder: Path, prompt_of: Callable[..., list[int]]) -> None:
    whole = LLM(folder, device="cpu")
    for slots in (1, 2, 5, 11, 24):
        same_bits(packed_llm(folder, slots, policy=policy), whole, prompt_of)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_every_family_gives_the_plain_bits(
    family: str, tiny: Callable[..., Any], prompt_of: Callable[..., list[int]]
) -> None:
    path = tiny(family, hidden_size=64, moe_intermediate_size=72, intermediate_size=72).path
    llm = LLM(path, device="cpu", dtype="bfloat16", expert_dtype="bf16-packed", policy="duo", expert_memory="30%")
    assert llm.unpacked_layers == []
    same_bits(llm, LLM(path, device="cpu", dtype="bfloat16"), prompt_of)


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("policy", ["lru", "duo", "on_demand"])
def test_every_policy_gives_the_plain_bits_on_a_gpu(
    policy: str, graph: bool, folder: Path, prompt_of: Callable[..., list[int]]
) -> None:
    whole = LLM(folder, device="cuda", compile="off")
    for slots in (1, 2, 5, 11, 24):
        llm = packed_llm(folder, slots, policy=policy, device="cuda", compile="off", graph=graph)
        for _ in range(3):  # prefill and decode take over from each other
            same_bits(llm, whole, prompt_of)


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["lru", "duo", "on_demand"])
def test_memory_that_cannot_be_pinned_gives_the_plain_bits(
    policy: str, folder: Path, prompt_of: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = LLM(folder, device="cuda", compile="off")
    monkeypatch.setattr("duomoe.experts.store.pin", lambda rows: False)
    same_bits(packed_llm(folder, 5, policy=policy, device="cuda", compile="off"), whole, prompt_of)


@pytest.mark.parametrize("link", [Adversary, lambda: HostLink(Pace(bandwidth=1e8, latency=1e-5))])
@pytest.mark.parametrize("slots", [2, 7, 23])
def test_no_stale_weight_is_ever_read(
    link: Callable[[], HostLink],
    slots: int,
    folder: Path,
    prompt_of: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over a link that is late, poisons slots and is interrupted, with a predictor that is wrong."""
    whole, llm = LLM(folder, device="cpu"), packed_llm(folder, slots)
    monkeypatch.setattr("duomoe.experts.decode.SENT_AHEAD", 3)
    policy: Any = llm.policy
    policy.decoder = Decode(
        policy.directory, policy.lease.pool, policy.decoder.free, policy.decoder.fetcher, True, Wrong(llm)
    )
    connect(llm, other := link())
    params = SamplingParams(max_new_tokens=10)
    for lengths in ((20,), (3, 17, 1), (1,)):
        prompts = [prompt_of(length, seed=length) for length in lengths]
        found = llm.generate(prompts, params)
        assert [c.token_ids for c in found] == [c.token_ids for c in whole.generate(prompts, params)]
    traffic = policy.traffic_so_far()
    assert traffic.prefetched_bytes > 0 and traffic.prefetch_used_bytes <= traffic.prefetched_bytes
    other.close()


def test_a_prefill_sends_each_row_as_it_is_stored(folder: Path, prompt_of: Callable[..., list[int]]) -> None:
    llm = packed_llm(folder, 6, policy="lru")
    connect(llm, link := Counter())
    traffic = llm.generate(prompt_of(200), SamplingParams(max_new_tokens=1))[0].metrics.experts
    assert len(set(link.sent)) == len(link.sent) == 24  # 200 tokens need all experts
    assert traffic.link_bytes == traffic.streamed_bytes == 8 * (2 * PACKED_BYTES + ROW_BYTES)
    link.close()


def test_what_was_sent_ahead_and_needed_has_the_bytes_that_were_sent(
    folder: Path, prompt_of: Callable[..., list[int]]
) -> None:
    llm = packed_llm(folder, 24, policy="layer_prefetch")
    traffic = llm.generate(prompt_of(200), SamplingParams(max_new_tokens=1))[0].metrics.experts
    assert traffic.prefetch_used_bytes == traffic.prefetched_bytes == 8 * (2 * PACKED_BYTES + ROW_BYTES)


def test_where_all_experts_are_on_the_device_nothing_is_packed(
    folder: Path, prompt_of: Callable[..., list[int]]
) -> None:
    llm = packed_llm(folder, 24, policy="resident")
    assert llm.unpacked_layers == [] and llm.plan.as_dict()["expert_dtype"] == "plain"
    assert llm.memory["expert_store_bytes"] == 0
    same_bits(llm, LLM(folder, device="cpu"), prompt_of)


def test_where_all_experts_fit_packed_alone_all_have_a_slot(
    all_pack: Path, prompt_of: Callable[..., list[int]]
) -> None:
    memory = 24 * PACKED_BYTES + ROW_BYTES
    llm = packed_llm(all_pack, 0, policy="auto", expert_memory=memory)
    assert (llm.plan.policy, llm.plan.num_slots, llm.plan.expert_format.name) == ("duo", 24, "bf16-packed")
    resident = packed_llm(all_pack, 24, policy="auto")
    assert (resident.plan.policy, resident.plan.expert_format.name) == ("resident", "plain")
    same_bits(llm, resident, prompt_of)
    traffic = llm.generate(prompt_of(60), SamplingParams(max_new_tokens=8))[0].metrics.experts
    assert traffic.link_bytes == 0  # all of them have been used before


def test_the_budget_decides_between_packed_and_resident(all_pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("duomoe.experts.compute.EXPANDED_BYTES", ROW_BYTES)

    def plan(memory: int | None) -> Plan:
        options = dict(gpu_memory=memory, expert_dtype="bf16-packed", max_model_len=512, max_batch=1)
        return EngineConfig(device="cpu", **options).plan(all_pack)  # type: ignore[arg-type]

    resident = plan(None)
    assert resident.policy == "resident" and resident.expert_format.name == "plain"
    assert plan(resident.total + ROW_BYTES).policy == "resident"
    packed = plan(resident.total - 1)
    assert (packed.policy, packed.num_slots) == ("duo", 24) and packed.total < resident.total
    fewer = plan(packed.total - 1)
    assert (fewer.policy, fewer.num_slots) == ("duo", 23)


def test_experts_too_small_to_pack_are_refused_in_one_line(tiny: Callable[..., Any]) -> None:
    path = tiny("qwen3_moe", hidden_size=16, moe_intermediate_size=8, head_dim=8).path
    with pytest.raises(InputError, match=r"^--expert-dtype bf16-packed: experts of this size[^\n]*leave it out$"):
        LLM(path, device="cpu", dtype="bfloat16", expert_dtype="bf16-packed")


def test_layers_that_do_not_pack_are_named_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(EMBEDDED_MODEL, model := tmp_path / "model", ignore=shutil.ignore_patterns("recipe"))
    args = ["--device", "cpu", "--model", str(model), "--prompt", "The sea", "--max-new-tokens", "2", "--verbose"]
    args += ["--policy", "duo", "--expert-memory", "12%", "--expert-dtype", "bf16-packed"]
    assert generate.main(args) == 0
    assert "bf16-packed" in (err := capsys.readouterr().err) and "do not pack" not in err
    tensors = load_file(model / "model.safetensors")
    for layer in (0, 3):
        tensors[EXPERT.format(layer=layer, expert=5, name="up")].view(-1)[::9] = 1e-30
    save_file(tensors, model / "model.safetensors")
    (model / "predictor.safetensors").unlink()
    assert generate.main(args) == 0
    assert "do not pack and stay plain: layer 0, 3" in capsys.readouterr().err


def test_a_gpu_gets_bfloat16_packed_where_that_is_smaller(all_pack: Path, tiny: Callable[..., Any]) -> None:
    folder = ModelFolder(all_pack)
    for device, dtype, name in (
        ("cuda", torch.bfloat16, "bf16-packed"),
        ("cuda", torch.float16, "plain"),
        ("cpu", torch.bfloat16, "plain"),
    ):
        assert folder.expert_format("auto", dtype, device).name == name
    assert folder.expert_format("plain", torch.bfloat16, "cuda").name == "plain"
    small = ModelFolder(tiny("qwen3_moe", hidden_size=16, moe_intermediate_size=8, head_dim=8).path)
    assert small.expert_format("auto", torch.bfloat16, "cuda").name == "plain"


@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_other_dtypes_are_refused_in_one_line(dtype: str, tiny: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match=r"^[^\n]*bf16-packed[^\n]*add --dtype bfloat16$"):
        LLM(tiny("qwen3_moe").path, device="cpu", dtype=dtype, expert_dtype="bf16-packed")  # float32, as stored
