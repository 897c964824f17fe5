"""What /metrics says. Names are vLLM's with another prefix, so that dashboards made for it need only that changed.

Counters are the engine's own totals, read when asked for; nothing is counted twice, and a step pays nothing for them.
Histograms are filled as answers end, on the event loop alone, which also reads them: no locks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from kvik.engine.engine import Engine
from kvik.engine.request import RequestStats

__all__ = ["Metrics"]

_TOKEN_TIMES = (
    0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
_TIMES = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0,
)  # fmt: skip


class Histogram:
    """Counts of values up to each bound, in seconds."""

    def __init__(self, name: str, meaning: str, bounds: tuple[float, ...]) -> None:
        self.name, self.meaning, self.bounds = name, meaning, bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def family(self, model: str) -> HistogramMetricFamily:
        """As Prometheus wants it: cumulative."""
        buckets: list[tuple[str, float]] = []
        so_far = 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            so_far += count
            buckets.append((bound, so_far))
        family = HistogramMetricFamily(self.name, self.meaning, labels=["model_name"])
        family.add_metric([model], buckets, self.total)
        return family


class Metrics(Collector):
    """The metrics of one engine behind HTTP."""

    def __init__(self, model: str, engine: Engine) -> None:
        self._model, self._engine = model, engine
        self._ended = {"stop": 0, "length": 0}
        self.prompt_tokens = 0  # of requests that were taken
        self.first_token = Histogram("kvik:time_to_first_token_seconds", "From arrival to the first token.", _TIMES)
        self.inter_token = Histogram("kvik:inter_token_latency_seconds", "Between two tokens.", _TOKEN_TIMES)
        self.whole = Histogram("kvik:e2e_request_latency_seconds", "From arrival to the end.", _TIMES)
        self.queue = Histogram("kvik:request_queue_time_seconds", "Before anything was computed.", _TIMES)
        self.prefill = Histogram("kvik:request_prefill_time_seconds", "From then to the first token.", _TIMES)
        self.decode = Histogram("kvik:request_decode_time_seconds", "From the first token to the end.", _TIMES)
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def request(self, stats: RequestStats) -> None:
        """A request has ended by itself."""
        if stats.first_token is not None:
            self.first_token.add(stats.first_token)
        for gap in stats.inter_token:
            self.inter_token.add(gap)
        self.whole.add(stats.queue + stats.prefill + stats.decode)
        self.queue.add(stats.queue)
        self.prefill.add(stats.prefill)
        self.decode.add(stats.decode)

    def answer(self, finish: str, count: int = 1) -> None:
        """Answers (samples) have ended by themselves. finish: OpenAI's finish_reason."""
        self._ended[finish] += count

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        engine, stats = self._engine, self._engine.stats
        scheduler, pool = engine.scheduler, engine.scheduler.pool
        for name, meaning, value in (
            ("kvik:num_requests_running", "Requests that run.", len(scheduler.running)),
            ("kvik:num_requests_waiting", "Requests that wait.", len(scheduler.waiting)),
            (
                "kvik:kv_cache_usage_perc",
                "Share of the KV cache in use, 0 to 1.",
                1 - pool.num_free_slabs / pool.num_slabs,
            ),
        ):
            gauge = GaugeMetricFamily(name, meaning, labels=["model_name"])
            gauge.add_metric([self._model], value)
            yield gauge
        for name, meaning, total in (
            (
                "kvik:prompt_tokens",
                "Prompt tokens of the requests taken.",
                self.prompt_tokens,
            ),
            ("kvik:generation_tokens", "Tokens generated.", stats.generated),
            ("kvik:num_preemptions", "Times a request's blocks were taken from it.", stats.preemptions),
            ("kvik:kv_evictions", "Times a sequence gave tokens up.", stats.evictions),
            ("kvik:kv_evicted_tokens", "Tokens given up, the mean over layers and KV heads.", stats.evicted_tokens),
            ("kvik:num_parked", "Times a request's blocks were moved out of the KV cache.", stats.parked),
            ("kvik:num_restored", "Times they were moved back.", stats.restored),
            ("kvik:prefix_cache_queries", "Tokens looked up in the prefix cache.", stats.prefix_query_tokens),
            ("kvik:prefix_cache_hits", "Tokens found there.", stats.prefix_hit_tokens),
        ):
            counter = CounterMetricFamily(name, meaning, labels=["model_name"])
            counter.add_metric([self._model], total)
            yield counter
        ended = CounterMetricFamily(
            "kvik:request_success", "Answers that ended, by how.", labels=["model_name", "finished_reason"]
        )
        for reason, count in (*self._ended.items(), ("abort", stats.cancelled), ("error", stats.failed)):
            ended.add_metric([self._model, reason], count)
        yield ended
        for histogram in (self.first_token, self.inter_token, self.whole, self.queue, self.prefill, self.decode):
            yield histogram.family(self._model)
