"""What else is served: models, tokens, health, metrics; and who may ask."""

import asyncio
import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from servers import NAME, InProcess

from duomoe import LLM
from duomoe.engine.completion import Chunk, Completion
from duomoe.engine.completion import Metrics as Timing
from duomoe.experts.link import Traffic
from duomoe.server.errors import ApiError
from duomoe.server.fields import parse_object
from duomoe.server.metrics import Metrics, Watch
from duomoe.server.protocol import ACCEPTED, NEUTRAL, parse_chat, parse_completion
from duomoe.server.service import Limits

KEYS = ["first-key", "second-key"]


def test_models_are_listed(server: InProcess, llm: LLM) -> None:
    (card,) = server.get("/v1/models").json()["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == (NAME, "model", llm.max_model_len)
    assert server.get(f"/v1/models/{NAME}").json() == card
    assert server.get("/v1/models/other/one").status_code == 404


def test_text_to_tokens_and_back(server: InProcess, llm: LLM) -> None:
    text = "Emma said: “naïve” 🙂<|endoftext|>"
    answer = server.post("/tokenize", {"model": NAME, "prompt": text, "return_token_strs": True}).json()
    tokens = llm.tokenizer.encode(text)
    assert (answer["tokens"], answer["count"], answer["max_model_len"]) == (tokens, len(tokens), llm.max_model_len)
    assert len(answer["token_strs"]) == len(tokens)
    assert server.post("/detokenize", {"tokens": tokens}).json() == {"prompt": text}
    assert server.post("/tokenize", {"prompt": "a " * 50_000}).json()["count"] > llm.max_model_len
    for body in ({"tokens": [10**9]}, {"tokens": "a"}, {"tokens": [1.5]}, {"tokens": [True]}, {}):
        assert server.error("/detokenize", 400, body)["param"] == "tokens"
    assert server.error("/tokenize", 400, {"prompt": "a", "surprise": 1})["param"] == "surprise"


def test_the_tokenizers_configuration_is_told(server: InProcess) -> None:
    assert server.get("/tokenizer_info").json()["eos_token"] == "<|endoftext|>"


def test_token_texts_are_bytes_of_characters(server: InProcess, llm: LLM) -> None:
    texts = server.service.model.texts
    assert texts is not None
    tokens = llm.tokenizer.encode("a 🙂 naïve\n", special=False)
    told = [texts.of(token) for token in tokens]
    assert b"".join(bytes(raw or []) for _, raw in told).decode() == "a 🙂 naïve\n"
    assert any("\N{REPLACEMENT CHARACTER}" in text for text, _ in told)


def test_what_is_not_served_is_an_error_in_the_same_shape(server: InProcess) -> None:
    assert server.error("/v1/nothing", 404, {})["type"] == "not_found_error"
    assert server.get("/v1/completions").status_code == 405
    assert server.get("/v1/completions").json()["error"]["message"]


def test_health_says_how_it_stands(llm: LLM) -> None:
    fresh = InProcess(None)
    assert (fresh.get("/health").status_code, fresh.get("/health").json()) == (503, {"status": "loading"})
    loading = fresh.post("/v1/completions", {"prompt": "a"})
    assert (loading.status_code, loading.headers["retry-after"]) == (503, "5")
    assert fresh.get("/metrics").status_code == 200
    fresh = InProcess(llm)
    assert (fresh.get("/health").status_code, fresh.get("/health").json()) == (200, {"status": "ready"})
    fresh.service.drain()
    assert (fresh.get("/health").status_code, fresh.get("/health").json()) == (503, {"status": "draining"})
    assert fresh.error("/v1/completions", 503, {"prompt": "a"})["code"] == "draining"
    fresh.service.fail("a test")
    assert fresh.get("/health").json() == {"status": "failed", "reason": "a test"}
    assert fresh.error("/v1/completions", 500, {"prompt": "a"})["type"] == "server_error"


def samples(text: str) -> dict[str, float]:
    """Metrics by name and labels, without the model's."""
    found = re.findall(r"^([^#\s]+) (\S+)$", text, re.MULTILINE)
    return {re.sub(r'model_name="[^"]*",?', "", name).replace(",}", "}"): float(value) for name, value in found}


def test_metrics_count_what_was_done(llm: LLM) -> None:
    server = InProcess(llm)
    server.complete(prompt=["The sea", "The sky"], n=2, max_tokens=5, ignore_eos=True)
    server.error("/v1/completions", 400, {"prompt": "a", "top_p": 2})
    answer = server.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    found = samples(answer.text)
    assert found["vllm:prompt_tokens_total{}"] == 5
    assert found["vllm:generation_tokens_total{}"] == 20
    assert found['vllm:request_success_total{finished_reason="length"}'] == 4
    assert found["vllm:time_to_first_token_seconds_count{}"] == 4
    assert found["vllm:inter_token_latency_seconds_count{}"] == 16
    assert found["vllm:e2e_request_latency_seconds_count{}"] == 4
    assert found["vllm:request_queue_time_seconds_count{}"] == 4
    queued, first = (found[f"vllm:{name}_seconds_sum{{}}"] for name in ("request_queue_time", "time_to_first_token"))
    assert 0 < queued < first  # a sequence is computed once it has left the queue
    assert found['duomoe:requests_refused_total{status="400"}'] == 1
    assert found["vllm:num_requests_running{}"] == found["vllm:num_requests_waiting{}"] == 0
    assert found["vllm:kv_cache_usage_perc{}"] == 0
    assert found["duomoe:experts{}"] == llm.plan.num_experts
    traffic = llm._thread.call(lambda engine: engine.policy.traffic_so_far())
    assert found["duomoe:expert_hits_total{}"] == traffic.hits > 0
    assert found['duomoe:link_bytes_total{cause="streamed"}'] == traffic.streamed_bytes


def test_documents_name_metrics_that_are_there(llm: LLM) -> None:
    server = InProcess(llm)
    server.complete(prompt="The sea", max_tokens=2)
    server.error("/v1/completions", 400, {})
    exposed = set(re.findall(r"^((?:vllm|duomoe):\w+)", server.get("/metrics").text, re.MULTILINE))
    docs = Path(__file__).parents[2] / "docs"
    named = set(re.findall(r"(?:vllm|duomoe):\w+", (docs / "grafana.json").read_text()))
    assert named
    assert named <= exposed
    told = set(re.findall(r"(?:vllm|duomoe):\w+", (docs / "serving.md").read_text()))
    families = {re.sub("_(total|bucket|count|sum|created)$", "", name) for name in exposed}
    assert told == families
    assert {name for name in families if name.startswith("vllm:") and name.endswith("_seconds")} <= {
        name.removesuffix("_bucket") for name in named
    }


def test_the_queue_time_is_the_engines() -> None:
    metrics = Metrics("a")
    watch = Watch(metrics)
    watch.submitted(prompt_tokens=3, choices=1)
    for queue_s in (1.25, 0.5):
        timing = Timing(3, 0, queue_s=queue_s, ttft_s=2.0, tpot_s=None, e2e_s=2.0, experts=Traffic())
        watch.take(0, [Chunk("a", 1, Completion("a", [1], "length", timing))])
    found = samples(metrics.exposition(None).decode())
    assert found["vllm:request_queue_time_seconds_sum{}"] == 1.75
    assert found["vllm:request_queue_time_seconds_count{}"] == 2


def test_metrics_do_not_wait_for_a_step(llm: LLM) -> None:
    server, go_on = InProcess(llm), threading.Event()
    before = samples(server.get("/metrics").text)
    llm._thread.send(lambda engine: go_on.wait(20) and None)
    try:
        begin = time.monotonic()
        assert (
            samples(server.get("/metrics").text)["duomoe:expert_hits_total{}"] == before["duomoe:expert_hits_total{}"]
        )
        assert server.get("/health").status_code == 200
        assert time.monotonic() - begin < 15
    finally:
        go_on.set()


def test_a_prompt_that_takes_long_does_not_hold_up_others(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    server, begun, go_on = InProcess(llm), threading.Event(), threading.Event()
    encode = type(llm.tokenizer).encode

    def slow(self: Any, text: str, *args: Any, **options: Any) -> list[int]:
        if text == "slow":
            begun.set()
            go_on.wait(20)
        return encode(self, text, *args, **options)

    monkeypatch.setattr(type(llm.tokenizer), "encode", slow)
    answers: list[int] = []
    body = {"prompt": "slow", "max_tokens": 1}
    asking = threading.Thread(target=lambda: answers.append(server.post("/v1/completions", body).status_code))
    asking.start()
    try:
        assert begun.wait(20)
        assert server.get("/health").status_code == 200
        assert server.complete(prompt="fast", max_tokens=1)["choices"]
        assert not answers
    finally:
        go_on.set()
        asking.join(20)
    assert answers == [200]


def test_who_has_no_key_is_told_so(llm: LLM) -> None:
    server = InProcess(llm, keys=KEYS)
    body = {"prompt": "The sea", "max_tokens": 1}
    for header in (None, "Bearer", "Bearer ", "Bearer first-ke", "Bearer first-key2", "Basic first-key", "first-key"):
        headers = {} if header is None else {"authorization": header}
        error = server.error("/v1/completions", 401, body, headers=headers)
        assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
        assert server.get("/v1/models", headers=headers).status_code == 401
        assert server.get("/tokenizer_info", headers=headers).status_code == 401
    for key in KEYS:
        assert server.post("/v1/completions", body, headers={"authorization": f"Bearer {key}"}).status_code == 200
    assert all(server.get(path).status_code == 200 for path in ("/", "/health", "/metrics"))


def test_pages_of_other_sites_may_not_ask(llm: LLM) -> None:
    server, keyed = InProcess(llm), InProcess(llm, keys=KEYS)
    body = {"prompt": "The sea", "max_tokens": 1}
    for origin in (
        "http://evil.example",
        "null",
        "http://localhost.evil.example:8000",
        "http://127.0.0.1.evil.example",
    ):
        assert server.error("/v1/completions", 403, body, headers={"origin": origin})["type"] == "permission_error"
    for origin in ("http://localhost:8000", "http://127.0.0.1", "http://[::1]:8000"):
        answer = server.post("/v1/completions", body, headers={"origin": origin})
        assert answer.status_code == 200
        assert not [name for name in answer.headers if name.startswith("access-control")]
    headers = {"origin": "https://chat.example", "authorization": f"Bearer {KEYS[0]}"}
    assert keyed.post("/v1/completions", body, headers=headers).status_code == 200
    error = server.error("/v1/completions", 415, content=json.dumps(body), headers={"content-type": "text/plain"})
    assert "application/json" in error["message"]


def test_requests_have_ids(server: InProcess) -> None:
    assert server.get("/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert re.fullmatch("[0-9a-f]{32}", server.get("/health").headers["x-request-id"])
    assert server.get("/health", headers={"x-request-id": "a" * 200}).headers["x-request-id"] != "a" * 200


def test_more_sequences_than_allowed_are_refused(llm: LLM) -> None:
    server = InProcess(llm, Limits(sequences=3))
    error = server.error("/v1/completions", 429, {"prompt": "a", "n": 4})
    assert error["type"] == "rate_limit_error"
    assert server.complete(prompt="a", n=3, max_tokens=1)["choices"]
    assert server.complete(prompt="a", n=3, max_tokens=1)["choices"]  # the count went back


def test_a_request_ends_with_its_time(llm: LLM) -> None:
    server = InProcess(llm, Limits(request_seconds=0.05))
    error = server.error("/v1/completions", 504, {"prompt": "a", "max_tokens": 4000, "ignore_eos": True})
    assert error["code"] == "timeout"
    assert llm._thread.call(lambda engine: engine.stats().used_pages) == 0
    assert server.service._sequences == server.service.requests == server.service._body_bytes == 0


def test_a_device_that_computes_no_more_ends_the_service(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a kernel went wrong")

    server = InProcess(llm)
    with monkeypatch.context() as patched:
        patched.setattr(type(llm.engine), "_begin_pass", fail)
        assert server.error("/v1/completions", 500, {"prompt": "a"})["type"] == "server_error"
        assert server.get("/health").json() == {"status": "ready"}  # it was the request's step alone
        patched.setattr(llm, "check_device", fail)
        server.error("/v1/completions", 500, {"prompt": "a"})
    assert server.get("/health").json() == {"status": "failed", "reason": "a kernel went wrong"}


def test_a_body_that_does_not_come_is_not_waited_for(llm: LLM) -> None:
    server = InProcess(llm, Limits(body_seconds=0.05))

    async def slow() -> Any:
        yield b'{"prompt": '
        await asyncio.sleep(30)

    headers = {"content-type": "application/json"}
    answer = server.run(server._client.post("/v1/completions", content=slow(), headers=headers))
    assert answer.status_code == 408
    assert server.service._body_bytes == 0


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b'{"prompt": "\xed\xa0\x80"}', "not UTF-8"),
        (b'{"prompt": "\\ud800"}', "cannot be turned into tokens"),
        (b'{"prompt": "a", "temperature": NaN}', "NaN is not a number"),
        (b'{"prompt": "a", "temperature": 1e999}', "beyond all bounds"),
        (b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "nested too deeply"),
        (b'{"prompt": "' + b"a " * 300_000 + b'"}', "tokens"),
        (b'{"prompt": [' + b"1," * 300_000 + b"1]}", "tokens"),
    ],
)
def test_a_hostile_body_is_refused(server: InProcess, body: bytes, message: str) -> None:
    assert message in server.error("/v1/completions", 400, content=body, headers=JSON)["message"]


def test_a_large_body_is_refused_before_it_is_read(server: InProcess) -> None:
    sent = 0

    async def large() -> Any:
        nonlocal sent
        for _ in range(100):
            sent += 1
            yield b" " * (1 << 20)

    answer = server.run(server._client.post("/v1/completions", content=large(), headers=JSON))
    assert answer.status_code == 413
    assert sent < 20
    headers = JSON | {"content-length": str(100 << 20)}
    assert server.error("/v1/completions", 413, content=b"{}", headers=headers)["code"] == "body_too_large"


SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5)
)
VALUES = st.recursive(SCALARS, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3))
NAMES = sorted(
    set(
        [
            "model",
            "prompt",
            "messages",
            "max_tokens",
            "max_completion_tokens",
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "n",
            "seed",
            "stop",
            "stream",
            "echo",
            "stream_options",
            "logprobs",
            "top_logprobs",
            "logit_bias",
            "stop_token_ids",
            "response_format",
            "structured_outputs",
            "tools",
            "tool_choice",
            "parallel_tool_calls",
            "chat_template_kwargs",
            "reasoning_effort",
            "cache_salt",
            "min_tokens",
            "ignore_eos",
        ]
    )
    | set(NEUTRAL)
    | ACCEPTED
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=6))
def test_whatever_fields_say_is_a_request_or_an_error_that_names_one(fields: dict[str, Any]) -> None:
    messages = {"messages": [{"role": "user", "content": "a"}]}
    for parse, needed in ((parse_completion, {"prompt": "a"}), (parse_chat, messages)):
        try:
            parse(parse_object(json.dumps(needed | fields).encode()))
        except ApiError as error:
            assert error.status == 400
            assert error.param is not None
            assert error.param.split(".")[0].split("[")[0] in {*fields, *needed}
