"""Experts of bfloat16 that are packed in host memory and over the link: the same bits, for fewer bytes."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_lossless import Adversary, Counter, Wrong, connect
from torch import Tensor

from duomoe import LLM, EngineConfig, InputError, SamplingParams, generate
from duomoe.experts.decode import Decode
from duomoe.experts.format import packed_format
from duomoe.experts.link import Copy, HostLink, Pace
from duomoe.experts.packed import pack_layer
from duomoe.experts.policies import BOUNDED
from duomoe.experts.store import ExpertStore
from duomoe.model_folder import EMBEDDED_MODEL

# An expert is two blocks of 16,384 values and a quarter, without bytes between its tensors.
HIDDEN, INTERMEDIATE = 128, 96
VALUES = 3 * HIDDEN * INTERMEDIATE
ROW_BYTES = 2 * VALUES
UNPACKED = 1  # the layer that does not pack

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
    options = dict(device="cpu", expert_memory=slots * ROW_BYTES, policy="duo") | options
    return LLM(folder, expert_dtype="bf16-packed", **options)


def row_bytes_by_hand(folder: Path) -> list[int]:
    """Bytes of a row of each layer: 12 bits a value, 4 bytes a block, and 4 for each value far below its block's."""
    tensors = load_file(folder / "model.safetensors")
    sizes = []
    for layer in range(3):
        most = 0
        for expert in range(8):
            matrices = [
                tensors[EXPERT.format(layer=layer, expert=expert, name=name)] for name in ("gate", "up", "down")
            ]
            exponents = torch.frexp(torch.cat([matrix.flatten().double() for matrix in matrices])).exponent
            zero = torch.cat([matrix.flatten() == 0 for matrix in matrices])
            parts = zip(exponents.split(16384), zero.split(16384), strict=True)
            far = (int(((part < part[~none].max() - 14) & ~none).sum()) for part, none in parts)
            most = max(most, sum(far))
        size = VALUES * 3 // 2 + 4 * 3 + 4 * most
        sizes.append(ROW_BYTES if most > VALUES // 64 else -(-size // 128) * 128)
    return sizes


def test_what_packs_is_packed(folder: Path) -> None:
    llm = packed_llm(folder, 5)
    sizes = row_bytes_by_hand(folder)
    assert sizes[UNPACKED] == ROW_BYTES and max(sizes[0], sizes[2]) < 0.76 * ROW_BYTES
    store = llm.policy.residency.store  # type: ignore[attr-defined]
    assert [rows.shape[1] for rows in store.layers] == sizes
    assert store.packed == [True, False, True] and llm.unpacked_layers == [UNPACKED]
    assert llm.memory["expert_store_bytes"] == 8 * sum(sizes)
    assert llm.memory["expert_slots_bytes"] == 5 * ROW_BYTES


def same_bits(llm: LLM, whole: LLM, prompt_of: Callable[..., list[int]]) -> None:
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
def test_rows_of_less_than_a_block_give_the_plain_bits(
    family: str, tiny: Callable[..., Any], prompt_of: Callable[..., list[int]]
) -> None:
    path = tiny(family).path
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


@pytest.mark.gpu
@pytest.mark.parametrize("slots", [2, 3])
def test_many_rows_at_once_over_a_gpus_link(slots: int, folder: Path) -> None:
    """Packed rows and plain ones into few slots, each sent over a slot before anybody has waited for the last one."""
    llm = packed_llm(folder, slots, policy="lru", device="cuda", compile="off")
    store, pool, link = (getattr(llm.policy.residency, name) for name in ("store", "pool", "link"))  # type: ignore[attr-defined]
    plain = LLM(folder, device="cpu", policy="lru", expert_memory=ROW_BYTES).policy.residency.store  # type: ignore[attr-defined]
    order = torch.randint(3 * 8, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    for number, expert in enumerate(order):
        layer, row = divmod(expert, 8)
        copy = link.send(store.layers[layer][row], pool.rows[number % slots])
        if number % 7 == 0:
            link.wait(copy)
            assert torch.equal(pool.rows[number % slots].cpu(), plain.layers[layer][row])
    torch.cuda.synchronize()
    for number in range(len(order) - slots, len(order)):
        layer, row = divmod(order[number], 8)
        assert torch.equal(pool.rows[number % slots].cpu(), plain.layers[layer][row])


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
    policy.decoder = Decode(policy.directory, policy.residency.pool, policy.decoder.fetcher, True, Wrong(llm))
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
    assert traffic.link_bytes == traffic.streamed_bytes == 8 * sum(row_bytes_by_hand(folder))
    link.close()


def test_what_was_sent_ahead_and_needed_has_the_bytes_that_were_sent(
    folder: Path, prompt_of: Callable[..., list[int]]
) -> None:
    llm = packed_llm(folder, 24, policy="layer_prefetch")
    traffic = llm.generate(prompt_of(200), SamplingParams(max_new_tokens=1))[0].metrics.experts
    assert traffic.prefetch_used_bytes == traffic.prefetched_bytes == 8 * sum(row_bytes_by_hand(folder))


def weights(rows: int, values: int) -> Tensor:
    return (torch.randn(rows, values, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16().view(torch.uint8)


def test_a_packed_copy_sent_ahead_makes_way_and_goes_on_where_it_stood() -> None:
    plain = weights(1, 20 * 16384 + 128)
    packed = pack_layer(plain)
    assert packed is not None
    link, slot = HostLink(Pace(bandwidth=5e6)), torch.full_like(plain[0], 0xFF)  # a row takes 0.1 s
    copy = link.send_ahead(Copy(packed[0], slot))
    while copy.moved == 0:
        time.sleep(0.001)
    link.recall()
    time.sleep(0.05)  # the piece that was on its way
    assert 0 < copy.moved == link.ahead_bytes < packed.shape[1] and not link.has_arrived(copy)
    there = copy.moved * 21 // packed.shape[1] * 2 * 16384
    assert torch.equal(slot[:there], plain[0, :there]) and (slot[there:] == 0xFF).all()
    link.wait(link.promote(copy))
    assert torch.equal(slot, plain[0])
    assert copy.moved == packed.shape[1] and copy.ahead == link.ahead_bytes < packed.shape[1]
    link.close()


def test_a_layer_of_which_one_row_does_not_pack_stays_plain() -> None:
    plain = weights(4, 16384 + 384)
    store = ExpertStore(packed_format(128, 43), 2, 4, torch.device("cpu"), pinned=False)
    plain = torch.nn.functional.pad(plain, (0, store.format.row_bytes - plain.shape[1]))
    store.add(plain)
    wild = plain.clone()
    wild[2].view(torch.bfloat16)[::50] = 1e-20
    store.add(wild)
    assert store.packed == [True, False]
    wild[:] = 0  # the caller's to use again
    assert store.layers[1].any()


def test_where_all_experts_are_on_the_device_nothing_is_packed(
    folder: Path, prompt_of: Callable[..., list[int]]
) -> None:
    llm = packed_llm(folder, 24, policy="resident")
    assert llm.unpacked_layers == [] and llm.plan.as_dict()["expert_dtype"] == "plain"
    assert llm.memory["expert_store_bytes"] == 0
    same_bits(llm, LLM(folder, device="cpu"), prompt_of)


def test_the_plan_estimates_what_is_packed() -> None:
    options = dict(device="cpu", dtype="bfloat16", policy="duo", expert_memory="15%")
    plain = EngineConfig(**options).plan()  # type: ignore[arg-type]
    llm = LLM(**options, expert_dtype="bf16-packed")
    assert llm.plan.as_dict()["expert_dtype"] == "bf16-packed" and "estimated" in llm.plan.table()
    assert llm.plan.num_slots == plain.num_slots and llm.plan.slot_bytes == plain.slot_bytes
    assert abs(llm.memory["expert_store_bytes"] - llm.plan.store_bytes) < 0.01 * llm.plan.store_bytes
    assert llm.memory["expert_store_bytes"] < 0.754 * plain.store_bytes


def test_layers_that_do_not_pack_are_named_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(EMBEDDED_MODEL, model := tmp_path / "model", ignore=shutil.ignore_patterns("recipe"))
    args = ["--device", "cpu", "--model", str(model), "--prompt", "The sea", "--max-new-tokens", "2", "--verbose"]
    args += ["--policy", "duo", "--expert-memory", "9%", "--expert-dtype", "bf16-packed"]
    assert generate.main(args) == 0
    assert "bf16-packed" in (err := capsys.readouterr().err) and "do not pack" not in err
    tensors = load_file(model / "model.safetensors")
    for layer in (0, 3):
        tensors[EXPERT.format(layer=layer, expert=5, name="up")].view(-1)[::9] = 1e-30
    save_file(tensors, model / "model.safetensors")
    (model / "predictor.safetensors").unlink()
    assert generate.main(args) == 0
    assert "do not pack and stay plain: layer 0, 3" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_other_dtypes_are_refused_in_one_line(dtype: str, tiny: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match=r"^[^\n]*bf16-packed[^\n]*add --dtype bfloat16$"):
        LLM(tiny("qwen3_moe").path, device="cpu", dtype=dtype, expert_dtype="bf16-packed")  # float32, as stored
