"""lm-evaluation-harness on a task of our own, where it is installed: `pip install 'lm-eval[api]'`."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from servers import NAME, Process

from duomoe import LLM, SamplingParams

HARNESS = os.environ.get("LM_EVAL_PYTHON", sys.executable)
pytestmark = pytest.mark.skipif(
    sys.executable == HARNESS and importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval"
)

CASES = [
    {"text": "The sea", "choices": [" is calm and", " %%% qx"]},
    {"text": "Emma was not at all", "choices": [" surprised when Mr.", "\n\n\t\t"]},
    {"text": "def main():", "choices": ["\n    return", " whale"]},
]
COMMON = """
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
doc_to_text: "{{text}}"
"""
CHOICE = """
task: choice
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc}]
"""
UNTIL = """
task: until
output_type: generate_until
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match}]
"""


def samples(process: Process, folder: Path, task: str, yaml: str) -> list[dict[str, Any]]:
    """What the harness has been answered to each case of a task."""
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(case) + "\n" for case in CASES))
    (folder / f"{task}.yaml").write_text(yaml + COMMON % data)
    server = f"model={NAME},base_url={process.url}/v1/completions,tokenizer_backend=remote,max_length=4096"
    options = ["--tasks", task, "--include_path", folder, "--log_samples", "--output_path", folder / "out"]
    command = [HARNESS, "-m", "lm_eval", "--model", "local-completions", "--model_args", server, *options]
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    done = subprocess.run([*command, "--batch_size", "4"], env=offline, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = (folder / "out").rglob("samples_*.jsonl")
    return sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])


def test_log_likelihoods_are_those_of_the_model(process: Process, llm: LLM, tmp_path: Path) -> None:
    for sample in samples(process, tmp_path, "choice", CHOICE):
        case = CASES[sample["doc_id"]]
        for choice, told in zip(case["choices"], sample["resps"], strict=True):
            begin, whole = llm.tokenizer.encode(case["text"]), llm.tokenizer.encode(case["text"] + choice)
            logprobs = llm.logits(whole).log_softmax(-1)[len(begin) - 1 : -1]
            expected = logprobs.gather(1, torch.tensor(whole[len(begin) :])[:, None]).sum().item()
            greedy = logprobs.argmax(-1).tolist() == whole[len(begin) :]
            assert float(told[0][0]) == pytest.approx(expected, abs=1e-2)
            assert (str(told[0][1]) == "True") == greedy


def test_what_is_generated_is_what_the_model_writes(process: Process, llm: LLM, tmp_path: Path) -> None:
    for sample in samples(process, tmp_path, "until", UNTIL):
        params = SamplingParams(max_new_tokens=8, stop=("\n",))
        assert sample["resps"] == [[llm.generate(CASES[sample["doc_id"]]["text"], params)[0].text]]
