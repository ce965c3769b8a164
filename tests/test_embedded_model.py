"""The model that ships with the package."""

import subprocess
import sys

import torch
import transformers

from duomoe import LLM, SamplingParams
from duomoe.llm import EMBEDDED_MODEL

TEXT = "And it came to pass in those days, that there went out a decree, and the people of the city said unto him,"


def test_it_is_small_and_has_a_card() -> None:
    sizes = {file.name: file.stat().st_size for file in EMBEDDED_MODEL.iterdir() if file.is_file()}
    assert sizes.pop("predictor.safetensors") <= 2_000_000
    assert sum(sizes.values()) <= 16_000_000
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= sizes.keys()


def test_it_equals_transformers() -> None:
    llm = LLM(device="cpu", dtype="float32")
    reference = transformers.AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32).eval()
    assert llm.tokenizer is not None
    tokens = llm.tokenizer.encode(TEXT)
    ids = torch.tensor([tokens])
    with torch.inference_mode():
        torch.testing.assert_close(llm.logits(tokens), reference(ids).logits[0], atol=1e-4, rtol=0)
        expected = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False)
    assert llm.generate(TEXT, SamplingParams(max_new_tokens=64))[0].token_ids == expected[0, len(tokens) :].tolist()


def test_it_has_learned_something() -> None:
    """The text's bits per byte are far under those of a uniform choice, and of any order-0 model of English."""
    llm = LLM(device="cpu")
    assert llm.tokenizer is not None
    tokens = llm.tokenizer.encode(TEXT)
    losses = torch.nn.functional.cross_entropy(llm.logits(tokens)[:-1], torch.tensor(tokens[1:]), reduction="sum")
    assert losses.item() / 0.693 / len(TEXT) < 2.0


def test_no_expert_is_dead() -> None:
    llm = LLM(device="cpu")
    assert llm.tokenizer is not None
    seen = [set() for _ in llm.config.moe_layers]
    llm.policy.observer = lambda index, h, routing: seen[index].update(routing.experts.flatten().tolist())
    for text in (TEXT, "def read(path):\n    return open(path).read()", "static int main(void) {", "NOUN. a kind of"):
        llm.generate(text, SamplingParams(max_new_tokens=48, temperature=1.0, seed=3))
    assert all(len(used) >= 0.9 * llm.config.num_experts for used in seen)


def test_the_first_token_comes_soon() -> None:
    """Not a benchmark: a guard against importing or compiling something heavy before the first token."""
    command = [sys.executable, "-X", "importtime", "-m", "duomoe.generate", "--device", "cpu"]
    command += ["--prompt", "The sea", "--max-new-tokens", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "torch" in imported
    assert not imported & {"torch._dynamo", "torch._inductor", "transformers", "jinja2.sandbox", "sympy"}
