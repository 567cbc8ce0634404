"""Metrics for Prometheus."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llama.server.loop import EngineLoop

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class _EngineCollector(Collector):
    """The engine's own counts, read at each scrape."""

    def __init__(self, loop: EngineLoop):
        self._loop = loop

    def collect(self) -> Iterator[Metric]:
        loop, counts = self._loop, self._loop.counts
        totals = {
            "llama_prompt_tokens": ("Prompt tokens processed", counts.prompt_tokens),
            "llama_cached_tokens": ("Prompt tokens reused from the cache", counts.reused_tokens),
            "llama_generated_tokens": ("Tokens generated", counts.generated_tokens),
            "llama_passes": ("Forward passes", counts.passes),
        }
        for name, (text, value) in totals.items():
            yield CounterMetricFamily(name, text, value)
        yield GaugeMetricFamily("llama_requests_active", "Running sequences", loop.n_active)
        yield GaugeMetricFamily("llama_requests_waiting", "Waiting sequences", loop.n_waiting)


class Metrics:
    """The server's metrics, of this process alone."""

    def __init__(self, loop: EngineLoop):
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(loop))
        self.requests = Counter(
            "llama_requests",
            "Requests answered",
            ("path", "status"),
            registry=self._registry,
        )
        self.first_token = Histogram(
            "llama_time_to_first_token_seconds",
            "Time from receiving a request to its first token",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.duration = Histogram(
            "llama_answer_seconds",
            "Time from receiving a request to its last token",
            buckets=_SECONDS,
            registry=self._registry,
        )

    def text(self) -> bytes:
        """Return the metrics in Prometheus's text format."""
        return generate_latest(self._registry)
