"""The server's Prometheus metrics: how busy the server is, how fast it answers, and how answers end.

The metrics contain no chat text.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# The histograms' buckets, in seconds. The first token may take milliseconds (small model, idle GPU) or minutes (full
# queue).
FIRST_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
PER_TOKEN = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """The metrics of one server. Each server has its own registry, so that one process can run several servers."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._registry = registry

        # How busy the server is. At each scrape by Prometheus, these gauges get their values from the pool (see
        # `Pool.publish`).
        self.slots = Gauge("nanochat_slots", "Samples that can be generated at once", registry=registry)
        self.running = Gauge("nanochat_requests_running", "Samples being generated", registry=registry)
        self.waiting = Gauge("nanochat_requests_waiting", "Samples waiting for a slot", registry=registry)
        self.cache_use = Gauge(
            "nanochat_cache_use_ratio", "Share of the key/value cache that holds tokens", registry=registry
        )

        # How much the server has done. prometheus_client appends "_total" to the name of a counter.
        self.prompt_tokens = Counter("nanochat_prompt_tokens", "Prompt tokens", registry=registry)
        self.cached_tokens = Counter(
            "nanochat_prompt_tokens_reused", "Prompt tokens that were already in the cache", registry=registry
        )
        self.generated_tokens = Counter("nanochat_generated_tokens", "Generated tokens", registry=registry)
        self.answers = Counter("nanochat_answers", "Answers by how they ended", ["end"], registry=registry)
        self.refused = Counter("nanochat_refused", "Refused requests by HTTP status", ["status"], registry=registry)

        # How fast the server answers.
        self.first_token = Histogram(
            "nanochat_time_to_first_token_seconds",
            "Time from a request to the first token of its answer",
            buckets=FIRST_TOKEN,
            registry=registry,
        )
        self.per_token = Histogram(
            "nanochat_time_per_token_seconds",
            "Time between two tokens of a sample, averaged over an answer",
            buckets=PER_TOKEN,
            registry=registry,
        )

    def text(self) -> bytes:
        """Returns all metrics in Prometheus' text format."""
        return generate_latest(self._registry)
