"""Many sequences of a real model's shape at a time, under the predictor that there is without a trained one."""

import subprocess
import sys
from pathlib import Path

import pytest

from duomoe import LLM, SamplingParams

RANDOM_MODEL = Path(__file__).parent.parent / "benchmarks" / "random_model.py"


@pytest.mark.gpu
def test_sixty_four_sequences_of_qwen3s_shape(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-P", RANDOM_MODEL, "qwen3-30b", "2", tmp_path], check=True)
    params = SamplingParams(max_new_tokens=4, ignore_eos=True)
    prompts = [[number + 1, 7, 11 * number + 3] for number in range(64)]
    config = {"device": "cuda", "max_batch": 64, "max_model_len": 64}
    llm = LLM(tmp_path, policy="duo", expert_memory="50%", **config)
    found = [completion.token_ids for completion in llm.generate(prompts, params)]
    assert llm.policy.traffic_so_far().link_bytes > 0
    assert llm.engine.decode_step._forwards and llm.engine.decode_step._samplings
    del llm
    whole = LLM(tmp_path, policy="duo", expert_memory="100%", **config)
    assert [completion.token_ids for completion in whole.generate(prompts, params)] == found
