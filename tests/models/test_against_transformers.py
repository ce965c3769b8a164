"""Our models against transformers, on tiny random checkpoints in float32."""

import json
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from duomoe import LLM, SamplingParams

YARN = dict(rope_type="yarn", factor=4.0, rope_theta=10000.0, original_max_position_embeddings=64)
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    rope_theta=10000.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {}),
    "mixtral, no grouped heads": ("mixtral", dict(num_key_value_heads=4)),
    "mixtral, one key head, tied": ("mixtral", dict(num_key_value_heads=1, tie_word_embeddings=True)),
    "mixtral, sliding window": ("mixtral", dict(sliding_window=9)),
    "mixtral, head_dim": ("mixtral", dict(head_dim=20)),
    "qwen2": ("qwen2_moe", {}),
    "qwen2, renormalised, no bias": ("qwen2_moe", dict(norm_topk_prob=True, qkv_bias=False)),
    "qwen2, dense layers": ("qwen2_moe", dict(mlp_only_layers=[1], num_hidden_layers=4)),
    "qwen2, sparse step": ("qwen2_moe", dict(decoder_sparse_step=2, num_hidden_layers=4, tie_word_embeddings=True)),
    "qwen2, sliding window": ("qwen2_moe", dict(use_sliding_window=True, sliding_window=7, max_window_layers=2)),
    "qwen3": ("qwen3_moe", {}),
    "qwen3, head_dim, tied": ("qwen3_moe", dict(head_dim=32, norm_topk_prob=True, tie_word_embeddings=True)),
    "qwen3, biases": ("qwen3_moe", dict(attention_bias=True, num_key_value_heads=1)),
    "qwen3, dense layer": ("qwen3_moe", dict(mlp_only_layers=[0, 2])),
    "qwen3, no experts at all": ("qwen3_moe", dict(mlp_only_layers=[0, 1, 2])),
    "qwen3, sliding window": ("qwen3_moe", dict(use_sliding_window=True, sliding_window=11)),
    "linear": ("qwen3_moe", dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=10000.0))),
    "dynamic": (
        "qwen3_moe",
        dict(rope_parameters=dict(rope_type="dynamic", factor=4.0, rope_theta=10000.0), max_position_embeddings=32),
    ),
    "yarn": ("qwen3_moe", dict(rope_parameters=YARN)),
    "yarn, attention factor": ("qwen3_moe", dict(rope_parameters=YARN | dict(attention_factor=0.9, beta_fast=16.0))),
    "llama3": ("mixtral", dict(rope_parameters=LLAMA3)),
}


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_greedy_tokens_equal_transformers(
    name: str, device: str, tiny: Callable[..., Any], prompt_of: Callable[..., list[int]]
) -> None:
    family, overrides = CONFIGS[name]
    model = tiny(family, **overrides)
    prompt = prompt_of(40)
    llm = LLM(model.path, device=device, compile="off")
    torch.testing.assert_close(llm.logits(prompt).cpu(), model.logits(prompt), atol=1e-4, rtol=0)

    completion = llm.generate(prompt, SamplingParams(max_new_tokens=64))[0]
    assert completion.token_ids == model.greedy(prompt, 64)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_every_decode_step_gives_the_logits_of_a_whole_pass(
    family: str, tiny: Callable[..., Any], prompt_of: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(family)
    llm = LLM(model.path, device="cpu")
    seen = []
    logits = llm.engine.model.logits

    def record(x: torch.Tensor) -> torch.Tensor:
        seen.append(logits(x)[0])
        return seen[-1][None]

    monkeypatch.setattr(llm.engine.model, "logits", record)
    prompt = prompt_of(15)  # a page less one token, so that decode crosses into a new page
    tokens = llm.generate(prompt, SamplingParams(max_new_tokens=20))[0].token_ids
    expected = model.logits(prompt + tokens[:-1])[len(prompt) - 1 :]
    torch.testing.assert_close(torch.stack(seen), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_a_batch_of_unequal_prompts_equals_one_by_one(
    family: str, tiny: Callable[..., Any], prompt_of: Callable[..., list[int]]
) -> None:
    model = tiny(family)
    llm = LLM(model.path, device="cpu", max_batch=4)
    prompts = [prompt_of(length, seed=length) for length in (1, 15, 16, 17, 40, 3)]  # more than run at once
    together = llm.generate(prompts, SamplingParams(max_new_tokens=24))
    for prompt, completion in zip(prompts, together, strict=True):
        assert completion.token_ids == model.greedy(prompt, 24)
    assert llm.engine.cache.pages.used == 0


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_blocks_give_the_same_tokens(
    device: str, tiny: Callable[..., Any], prompt_of: Callable[..., list[int]]
) -> None:
    model = tiny("qwen2_moe", mlp_only_layers=[1], num_hidden_layers=4)
    prompt = prompt_of(20)
    compiled = LLM(model.path, device=device, compile="on")
    torch.testing.assert_close(compiled.logits(prompt).cpu(), model.logits(prompt), atol=1e-4, rtol=0)
    assert compiled.generate(prompt, SamplingParams(max_new_tokens=16))[0].token_ids == model.greedy(prompt, 16)


@pytest.mark.parametrize("device", DEVICES)
def test_many_compiled_models_in_one_process(
    device: str, tiny: Callable[..., Any], prompt_of: Callable[..., list[int]]
) -> None:
    """torch.compile gives up at the eighth variant of a function; each model must have variants of its own."""
    models = [tiny("mixtral", num_hidden_layers=1, hidden_size=32 + 8 * index) for index in range(3)]
    for model in [*models, *models, *models]:
        llm = LLM(model.path, device=device, compile="on")
        prompt = prompt_of(5)
        torch.testing.assert_close(llm.logits(prompt).cpu(), model.logits(prompt), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("family", "change"), [("mixtral", dict(rms_norm_eps=None)), ("qwen3_moe", dict(tie_word_embeddings=True))]
)
def test_a_changed_config_reads_as_transformers_reads_it(
    family: str, change: dict[str, Any], tiny: Callable[..., Any], prompt_of: Callable[..., list[int]], tmp_path: Any
) -> None:
    """A key that is missing has the family's default; a head that is stored is used though the config ties it."""
    changed = shutil.copytree(tiny(family).path, tmp_path / "changed")
    config = json.loads((changed / "config.json").read_text()) | change
    (changed / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    reference = transformers.AutoModelForCausalLM.from_pretrained(changed).eval()
    prompt = prompt_of(30)
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(LLM(changed, device="cpu").logits(prompt), expected, atol=1e-4, rtol=0)


def test_old_config_spellings_read_the_same(
    tiny: Callable[..., Any], prompt_of: Callable[..., list[int]], tmp_path: Any
) -> None:
    model = tiny("qwen3_moe", rope_parameters=YARN)
    old = tmp_path / "old"
    shutil.copytree(model.path, old)
    config = json.loads((old / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
    config["torch_dtype"] = config.pop("dtype")
    config["num_experts"] = config.pop("num_local_experts")
    (old / "config.json").write_text(json.dumps(config))
    assert LLM(old, device="cpu").config == LLM(model.path, device="cpu").config
    prompt = prompt_of(10)
    torch.testing.assert_close(LLM(old, device="cpu").logits(prompt), model.logits(prompt), atol=1e-4, rtol=0)
