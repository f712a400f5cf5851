"""What /metrics says, in Prometheus' text form."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from bitwright.serve.engine import Engine

COUNTERS = {
    "prompt": "Tokens of prompts that were read.",
    "cached": "Tokens of prompts that had been read before.",
    "written": "Tokens written.",
    "proposed": "Tokens that look-ahead proposed.",
    "kept": "Tokens of those that were kept.",
    "steps": "Readings of the weights.",
}
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Requests by path and status, and what an engine has counted."""

    def __init__(self, engine: Engine) -> None:
        self.registry, self.engine = CollectorRegistry(), engine
        self.requests = Counter("bitwright_requests", "Requests answered.", ["path", "status"], registry=self.registry)
        self.seconds = Histogram(
            "bitwright_request_seconds", "From a request to its answer's end.", buckets=SECONDS, registry=self.registry
        )
        self.first = Histogram(
            "bitwright_first_token_seconds",
            "From a request to its first token.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """The engine's own figures, as they are now."""
        for name, meaning in COUNTERS.items():
            family = CounterMetricFamily(f"bitwright_{name}_tokens" if name != "steps" else "bitwright_steps", meaning)
            family.add_metric([], getattr(self.engine.counts, name))
            yield family
        yield GaugeMetricFamily("bitwright_running", "Answers being written.", value=len(self.engine.running))
        yield GaugeMetricFamily("bitwright_waiting", "Answers waiting for a slot.", value=len(self.engine.waiting))
        yield GaugeMetricFamily("bitwright_slots", "Answers written at once at most.", value=self.engine.decoder.slots)

    def text(self) -> bytes:
        """Everything, for a scraper."""
        first = self.engine.counts.first_token
        while first:
            self.first.observe(first.pop())
        return generate_latest(self.registry)
