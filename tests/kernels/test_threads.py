from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from duomoe import LLM, SamplingParams
from duomoe.kernels.rms_norm import rms_norm, rms_norm_reference
from duomoe.kernels.threads import WORTH_SHARING, Threads, product_work


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_little_work_stays_on_one_thread(two_threads: None) -> None:
    with Threads(WORTH_SHARING):
        assert torch.get_num_threads() == 2
        with pytest.raises(KeyError), Threads(WORTH_SHARING - 1):
            assert torch.get_num_threads() == 1
            with Threads(WORTH_SHARING):
                assert torch.get_num_threads() == 1
            assert torch.get_num_threads() == 1
            raise KeyError
        assert torch.get_num_threads() == 2


def test_a_product_of_few_rows_costs_the_reading_of_its_weights() -> None:
    assert product_work(1, 1000) == product_work(16, 1000) == 1000
    assert product_work(512, 1000) == 32_000


def test_decode_wakes_no_thread_and_a_long_prompt_does(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(device="cpu")
    seen: set[tuple[bool, int]] = set()
    linear = torch.nn.functional.linear

    def record(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.add((len(x) == 1, torch.get_num_threads()))
        return linear(x, *rest)

    monkeypatch.setattr(torch.nn.functional, "linear", record)
    llm.generate(list(range(512)), SamplingParams(max_new_tokens=3))
    assert seen == {(True, 1), (False, 2)}
    assert torch.get_num_threads() == 2


def test_a_dispatch_mode_sees_an_operator_and_not_what_is_in_it() -> None:
    names = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    x, weight = torch.randn(3, 32), torch.randn(32)
    with Recorder():
        out = rms_norm(x, weight, 1e-6)
    assert names == ["duomoe::rms_norm"]
    assert torch.equal(out, rms_norm(x, weight, 1e-6))
    torch.testing.assert_close(out, rms_norm_reference(x, weight, 1e-6))
