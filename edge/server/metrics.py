"""What Prometheus reads at /metrics, in a registry of its own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from edge.engine import Engine
from edge.serving.request import Ticket

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """Observes a batcher (edge/serving/request.py's Observer) and draws up the page."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        names = ("Requests that ended, by how.", ["finish_reason"])
        self._requests = Counter("edge_requests", *names, registry=registry)
        self._refused = Counter("edge_requests_refused", "Requests that were not taken.", ["status"], registry=registry)
        self._prompt = Counter("edge_prompt_tokens", "Tokens of prompts that were admitted.", registry=registry)
        self._cached = Counter("edge_cached_prompt_tokens", "Those that the prefix cache had.", registry=registry)
        self._generated = Counter("edge_generation_tokens", "Tokens of replies.", registry=registry)
        self._preempted = Counter("edge_preemptions", "Requests that gave up their pages.", registry=registry)
        self._proposed = Counter("edge_speculated_tokens", "Tokens that were proposed and verified.", registry=registry)
        self._accepted = Counter("edge_accepted_tokens", "Those that were accepted.", registry=registry)
        self._steps = Counter("edge_speculated_steps", "Verified trees.", registry=registry)
        self._wait = self._histogram("edge_queue_seconds", "From arrival to admission.")
        self._first = self._histogram("edge_time_to_first_token_seconds", "From arrival to the first token.")
        self._gap = self._histogram("edge_inter_token_seconds", "Between two tokens of a reply.")
        self._whole = self._histogram("edge_request_seconds", "From arrival to the end.")
        self._running = Gauge("edge_requests_running", "Requests in the batch.", registry=registry)
        self._waiting = Gauge("edge_requests_waiting", "Requests in the queue.", registry=registry)
        self._pages = Gauge("edge_kv_pages", "Pages of the KV cache, by what they are.", ["state"], registry=registry)
        self.mean_seconds = 1.0  # of a request, the latest ones counting most

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, buckets=_SECONDS, registry=self.registry)

    def first_token(self, ticket: Ticket) -> None:
        """See Observer."""
        statistics = ticket.statistics
        if statistics.first_token is not None:
            self._first.observe(statistics.first_token - statistics.arrived)

    def tokens(self, count: int, seconds: float) -> None:
        """See Observer."""
        for _ in range(count):
            self._gap.observe(seconds / count)

    def finished(self, ticket: Ticket) -> None:
        """See Observer."""
        statistics = ticket.statistics
        self._requests.labels(ticket.finish_reason).inc()
        self._generated.inc(statistics.tokens)
        self._preempted.inc(statistics.preemptions)
        if statistics.admitted is not None:
            self._wait.observe(statistics.admitted - statistics.arrived)
            self._prompt.inc(len(ticket.request.prompt_ids))
            self._cached.inc(statistics.cached_tokens)
        if statistics.finished is not None:
            seconds = statistics.finished - statistics.arrived
            self._whole.observe(seconds)
            self.mean_seconds += 0.1 * (seconds - self.mean_seconds)
        if statistics.speculated is not None:
            self._proposed.inc(statistics.speculated.proposed)
            self._accepted.inc(statistics.speculated.accepted)
            self._steps.inc(statistics.speculated.steps)

    def refused(self, status: int) -> None:
        """A request was answered with an error at once."""
        self._refused.labels(str(status)).inc()

    def page(self, engine: Engine, running: int, waiting: int) -> bytes:
        """The page, with what is there just now."""
        self._running.set(running)
        self._waiting.set(waiting)
        self._pages.labels("held").set(engine.cache.held_pages)
        self._pages.labels("cached").set(engine.cache.cached_pages)
        self._pages.labels("empty").set(engine.cache.empty_pages)
        return generate_latest(self.registry)
