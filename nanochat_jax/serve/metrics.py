"""What Prometheus may know about the server: how busy it is, how fast, and how answers end. Nothing of what is said."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Seconds. The first token of a small model on an idle GPU takes milliseconds, one behind a full queue minutes.
FIRST_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
PER_TOKEN = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """The instruments of one server, in a registry of their own, so that a process may have several servers."""

    def __init__(self):
        own = {"namespace": "nanochat", "registry": CollectorRegistry()}
        self._registry = own["registry"]
        ProcessCollector(registry=self._registry)
        self.running = Gauge("requests_running", "Answers being generated", **own)
        self.waiting = Gauge("requests_waiting", "Answers that wait for a slot", **own)
        self.slots = Gauge("slots", "Answers that can be generated at once", **own)
        self.cache_use = Gauge("cache_use_ratio", "Share of the key/value cache that holds tokens", **own)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts", **own)
        self.reused_tokens = Counter("prompt_tokens_reused", "Tokens of prompts that were in the cache already", **own)
        self.generated_tokens = Counter("generated_tokens", "Tokens generated", **own)
        self.answers = Counter("answers", "Requests by how their answers ended", ["end"], **own)
        self.refused = Counter("refused", "Requests refused, by HTTP status", ["status"], **own)
        self.first_token = Histogram(
            "time_to_first_token_seconds", "From a request to the first token of its answer", buckets=FIRST_TOKEN, **own
        )
        self.per_token = Histogram(
            "time_per_token_seconds", "Time between two tokens of a sample, averaged over an answer",
            buckets=PER_TOKEN, **own,
        )  # fmt: skip

    def watch(self, worker) -> None:
        """Reads from `worker` what changes by itself, whenever it is asked for."""
        self.slots.set_function(lambda: worker.slots)
        self.running.set_function(lambda: worker.running)
        self.waiting.set_function(lambda: worker.waiting)
        self.cache_use.set_function(lambda: worker.cache_use)

    def ended(self, answer, end: str) -> None:
        self.answers.labels(end).inc()
        timing, later = answer.timing, answer.timing.tokens - answer.samples  # tokens after the first of each sample
        if timing.first is not None and later > 0:
            self.per_token.observe((time.monotonic() - timing.first) * answer.samples / later)

    def text(self) -> bytes:
        """Everything in Prometheus' format."""
        return generate_latest(self._registry)
