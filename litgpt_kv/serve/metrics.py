"""What Prometheus reads at `/metrics`."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters, gauges and histograms of one server; names begin with `litgpt_kv_`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        known = {"namespace": "litgpt_kv", "registry": self.registry}
        self.requests = Counter("requests", "Requests answered", ["path", "status"], **known)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts read", **known)
        self.new_tokens = Counter("new_tokens", "Tokens made", **known)
        self.finished = Counter("answers", "Answers ended, by reason", ["reason"], **known)
        self.failed_steps = Counter("failed_steps", "Steps of the engine that raised an error", **known)
        self.waiting = Gauge("waiting_answers", "Answers that wait for a row", ["cache"], **known)
        self.rows_busy = Gauge("rows_busy", "Rows that make an answer", ["cache"], **known)
        self.rows = Gauge("rows", "Rows of the cache", ["cache"], **known)
        self.kept = Gauge("kept_tokens", "Tokens that busy rows keep (the most of any head)", ["cache"], **known)
        self.seen = Gauge("seen_tokens", "Tokens that busy rows have seen", ["cache"], **known)
        self.cache_bytes = Gauge("cache_bytes", "Memory of the cache", ["cache"], **known)
        self.conversations = Gauge("conversations", "Conversations whose state is kept", **known)
        self.conversation_bytes = Gauge("conversation_bytes", "Memory of conversations' states", **known)
        histogram = {"buckets": SECONDS, **known}
        self.first_token = Histogram("time_to_first_token_seconds", "From request to first token", **histogram)
        self.between = Histogram("time_between_tokens_seconds", "Between two tokens of an answer", **histogram)
        self.whole = Histogram("request_seconds", "From request to the end of its answers", **histogram)
        self.step = Histogram("step_seconds", "One step of the engine", **histogram)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)
