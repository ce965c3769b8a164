"""What Prometheus reads: vLLM's names where there is one for a thing, so that its dashboards work; else our own."""

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from duomoe.engine.completion import Chunk
    from duomoe.server.gauges import Gauges

# Seconds: from a small model's token on a GPU to a long prompt whose experts cross a slow link.
_FIRST_TOKEN = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5, 10, 20, 40, 80, 160)
_BETWEEN_TOKENS = (0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.12, 0.25, 0.5, 1, 2, 4, 8)
_WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)


class Metrics:
    """The counts of one server, in the event loop.

    Args:
        name: the model's, a label of all of them.
    """

    def __init__(self, name: str) -> None:
        registry = self._registry = CollectorRegistry()

        def counter(metric: str, text: str, *labels: str) -> Counter:
            return Counter(metric, text, ["model_name", *labels], registry=registry)

        def histogram(metric: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(metric, text, ["model_name"], registry=registry, buckets=buckets).labels(name)

        self.prompt_tokens = counter("vllm:prompt_tokens", "Tokens of prompts.").labels(name)
        self.generated_tokens = counter("vllm:generation_tokens", "Tokens that were generated.").labels(name)
        self._finished = counter("vllm:request_success", "Sequences that are complete, by how.", "finished_reason")
        self._refused = counter("duomoe:requests_refused", "Requests that were answered with an error.", "status")
        self.abandoned = counter("duomoe:requests_abandoned", "Requests whose client left.").labels(name)
        self.ttft = histogram("vllm:time_to_first_token_seconds", "From arrival to the first token.", _FIRST_TOKEN)
        self.between = histogram("vllm:inter_token_latency_seconds", "Between a sequence's tokens.", _BETWEEN_TOKENS)
        self.whole = histogram("vllm:e2e_request_latency_seconds", "From arrival to a sequence's end.", _WHOLE)
        self.prompt_length = histogram("vllm:request_prompt_tokens", "Tokens of a request's prompts.", _TOKENS)
        self.length = histogram("vllm:request_generation_tokens", "Tokens generated for a sequence.", _TOKENS)
        self._engine = _EngineCollector(name)
        registry.register(self._engine)
        ProcessCollector(registry=registry)
        self._name = name

    def refuse(self, status: int) -> None:
        """Count a request that was answered with an error."""
        self._refused.labels(self._name, str(status)).inc()

    def finish(self, reason: str) -> None:
        """Count a sequence that is complete."""
        self._finished.labels(self._name, reason).inc()

    def exposition(self, gauges: "Gauges | None") -> bytes:
        """Return all metrics as text; how the engine stands is left out where it is None."""
        self._engine.gauges = gauges
        text: bytes = generate_latest(self._registry)
        return text


class _EngineCollector(Collector):
    """Lets a registry ask for what the engine counts.

    Args:
        name: the model's.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self.gauges: Gauges | None = None

    def collect(self) -> Iterator[Metric]:
        """Return how the engine stood when it was last read."""
        if self.gauges is not None:
            yield from self._gauges(self.gauges)
            yield from self._counters(self.gauges)

    def _gauges(self, gauges: "Gauges") -> Iterator[Metric]:
        values = {
            "vllm:num_requests_running": ("Sequences that are being computed.", gauges.running),
            "vllm:num_requests_waiting": ("Sequences that wait for their prefill.", gauges.waiting),
            "vllm:kv_cache_usage_perc": ("Share of KV pages in use, up to 1.", gauges.pages_used / gauges.pages),
            "duomoe:kv_pages": ("KV pages in all.", gauges.pages),
            "duomoe:expert_slots": ("Slots for experts on the device.", gauges.slots),
            "duomoe:experts": ("Experts of all layers.", gauges.experts),
        }
        for metric, (text, value) in values.items():
            family = GaugeMetricFamily(metric, text, labels=["model_name"])
            family.add_metric([self._name], value)
            yield family

    def _counters(self, gauges: "Gauges") -> Iterator[Metric]:
        traffic = gauges.traffic
        values = {
            "duomoe:expert_hits": ("Experts that a layer needed and that had a slot.", traffic.hits),
            "duomoe:expert_misses": ("Experts that a layer needed and that had none.", traffic.misses),
            "duomoe:prefetch_used_bytes": ("Prefetched bytes that were needed then.", traffic.prefetch_used_bytes),
        }
        for metric, (text, value) in values.items():
            family = CounterMetricFamily(metric, text, labels=["model_name"])
            family.add_metric([self._name], value)
            yield family
        causes = {"streamed": traffic.streamed_bytes, "demand": traffic.demand_bytes}
        link = CounterMetricFamily("duomoe:link_bytes", "Bytes of experts sent.", labels=["model_name", "cause"])
        for cause, value in (causes | {"prefetched": traffic.prefetched_bytes}).items():
            link.add_metric([self._name, cause], value)
        yield link


class Watch:
    """Times one request from its arrival on, and counts its tokens.

    Args:
        metrics: where times and counts go.

    Attributes:
        prompt_tokens: of all its prompts.
        tokens: that were generated so far, for all its choices.
        ttft_s: seconds from the arrival to the first token; None before it.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.arrived = time.perf_counter()
        self._last: list[float] = []
        self._counts: list[int] = []
        self.prompt_tokens = self.tokens = 0
        self.ttft_s: float | None = None

    def submitted(self, prompt_tokens: int, choices: int) -> None:
        """Note what the request came to."""
        self._last, self._counts = [self.arrived] * choices, [0] * choices
        self.prompt_tokens = prompt_tokens
        self._metrics.prompt_tokens.inc(prompt_tokens)
        self._metrics.prompt_length.observe(prompt_tokens)

    def take(self, index: int, chunks: "Sequence[Chunk]") -> None:
        """Note tokens of a choice that have just come; several are taken to have come evenly."""
        now, count = time.perf_counter(), len(chunks)
        passed, self._last[index] = now - self._last[index], now
        if not self._counts[index]:
            self._metrics.ttft.observe(passed)
            self.ttft_s = passed if self.ttft_s is None else self.ttft_s
            count -= 1
            passed = 0.0
        for _ in range(count):
            self._metrics.between.observe(passed / count)
        self._counts[index] += len(chunks)
        self.tokens += len(chunks)
        self._metrics.generated_tokens.inc(len(chunks))
        if (completion := chunks[-1].completion) is not None:
            self._metrics.finish(completion.finish_reason)
            self._metrics.length.observe(self._counts[index])
            self._metrics.whole.observe(now - self.arrived)
