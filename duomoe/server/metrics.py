"""What Prometheus reads: vLLM's names where there is one for a thing, so that its dashboards work; else our own."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from duomoe.engine.completion import Chunk
    from duomoe.engine.stats import Stats

# Seconds: from a small model's token on a GPU to a long prompt whose experts cross a slow link.
_FIRST_TOKEN = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5, 10, 20, 40, 80, 160)
_BETWEEN_TOKENS = (0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.12, 0.25, 0.5, 1, 2, 4, 8)
_WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)


@dataclass(frozen=True)
class Reading:
    """The engine at some moment.

    Attributes:
        stats: what it has under way and has done.
        slots: for experts, on the device.
        experts: of all layers.
    """

    stats: "Stats"
    slots: int
    experts: int


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
        self.queued = histogram("vllm:request_queue_time_seconds", "From arrival to admission.", _FIRST_TOKEN)
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

    def exposition(self, reading: Reading | None) -> bytes:
        """Return all metrics as text; how the engine stands is left out where it is None."""
        self._engine.reading = reading
        text: bytes = generate_latest(self._registry)
        return text


class _EngineCollector(Collector):
    """Lets a registry ask for what the engine counts.

    Args:
        name: the model's.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self.reading: Reading | None = None

    def collect(self) -> Iterator[Metric]:
        """Return how the engine stood when it was last read."""
        if self.reading is not None:
            yield from self._gauges(self.reading)
            yield from self._counters(self.reading.stats)

    def _gauges(self, reading: Reading) -> Iterator[Metric]:
        stats = reading.stats
        values = {
            "vllm:num_requests_running": ("Sequences that are being computed.", stats.running),
            "vllm:num_requests_waiting": ("Sequences that wait.", stats.waiting),
            "vllm:kv_cache_usage_perc": (
                "Share of KV pages that sequences hold, to 1.",
                stats.used_pages / stats.pages,
            ),
            "duomoe:kv_pages": ("KV pages in all.", stats.pages),
            "duomoe:kept_pages": ("KV pages kept for prompts that begin alike.", stats.kept_pages),
            "duomoe:expert_slots": ("Slots for experts on the device.", reading.slots),
            "duomoe:experts": ("Experts of all layers.", reading.experts),
        }
        for metric, (text, value) in values.items():
            family = GaugeMetricFamily(metric, text, labels=["model_name"])
            family.add_metric([self._name], value)
            yield family

    def _counters(self, stats: "Stats") -> Iterator[Metric]:
        traffic = stats.experts
        values = {
            "vllm:prefix_cache_queries": ("Tokens of prompts that were looked for in pages.", stats.prompt_tokens),
            "vllm:prefix_cache_hits": ("Tokens of prompts that were found in pages.", stats.found_tokens),
            "vllm:num_preemptions": ("How often a sequence gave its pages to others.", stats.preemptions),
            "duomoe:expert_hits": ("Experts that a layer needed and that had a slot.", traffic.hits),
            "duomoe:expert_misses": ("Experts that a layer needed and that had none.", traffic.misses),
            "duomoe:prefetch_used_bytes": ("Prefetched bytes that were needed then.", traffic.prefetch_used_bytes),
        }
        for metric, (text, value) in values.items():
            family = CounterMetricFamily(metric, text, labels=["model_name"])
            family.add_metric([self._name], value)
            yield family
        causes = {"streamed": traffic.streamed_bytes, "demand": traffic.demand_bytes}
        sent = causes | {"prefetched": traffic.prefetched_bytes}
        yield self._labelled("duomoe:link_bytes", "Bytes of experts sent.", "cause", sent)
        yield self._labelled("duomoe:passes", "Passes.", "kind", {"prefill": stats.passes, "decode": stats.steps})
        took = {"prefill": stats.pass_s, "decode": stats.step_s}
        yield self._labelled("duomoe:pass_seconds", "What passes took.", "kind", took)
        expected = {"prefill": stats.expected_pass_s, "decode": stats.expected_step_s}
        yield self._labelled("duomoe:pass_seconds_expected", "What they were expected to take.", "kind", expected)

    def _labelled(self, metric: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
        """Return a counter that is divided by a label."""
        family = CounterMetricFamily(metric, text, labels=["model_name", label])
        for name, value in values.items():
            family.add_metric([self._name, name], value)
        return family


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
            self._metrics.queued.observe(completion.metrics.queue_s)
