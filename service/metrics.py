"""Prometheus: what the two tiers, the queue and the requests do. Names alone, never text of a prompt."""

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import grpc
from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from tidegate.engine.config import ConfigError
from tidegate.engine.messages import DURATION_BOUNDS, Durations, EngineInfo, ProgressKind, Stats, TierStats
from tidegate.service.events import Failed, Finished
from tidegate.service.generation import Generation
from tidegate.service.hub import Hub
from tidegate.service.observe import Observer

SESSION_METHOD = "/tidegate.v1.InferenceService/Session"
LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TOKEN_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
LENGTH_BUCKETS = (16.0, 64.0, 256.0, 1024.0, 4096.0, 16384.0, 65536.0)


class Metrics:
    """All that a scrape of one server shows. Made once for a server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = RequestMetrics(self.registry)
        self.rpcs = RpcMetrics(self.registry)

    def watch(self, info: EngineInfo, hub: Hub) -> None:
        """From now on, show the engine and the queue too."""
        self.registry.register(_EngineCollector(info, hub, self.rpcs))

    def serve(self, address: str) -> "MetricsServer":
        """Answer scrapes from a thread until the server is closed. Raises ``ConfigError``."""
        host, _, port = address.rpartition(":")
        try:
            server, thread = start_http_server(int(port), host.strip("[]"), self.registry)
        except OSError as error:
            raise ConfigError(f"metrics_port {address} cannot be opened: {error.strerror}") from error
        return MetricsServer(
            f"{host}:{server.server_port}", server.shutdown, server.server_close, thread.join
        )


@dataclass(frozen=True, slots=True)
class MetricsServer:
    address: str
    _shutdown: Callable[[], None]
    _close: Callable[[], None]
    _join: Callable[[], None]

    def close(self) -> None:
        self._shutdown()
        self._close()
        self._join()


@dataclass(slots=True)
class _Times:
    """Of one request; monotonic seconds."""

    arrived: float
    is_admitted: bool = False
    last_tokens: float | None = None


class RequestMetrics(Observer):
    """Counts requests, and how long they take."""

    hears_tokens = True

    def __init__(self, registry: CollectorRegistry) -> None:
        def histogram(name: str, text: str, buckets: tuple[float, ...] = LATENCY_BUCKETS) -> Histogram:
            return Histogram(f"tidegate_{name}", text, buckets=buckets, registry=registry)

        self._ended = Counter(
            "tidegate_requests",
            "Requests that are over; the reason is why they finished or failed",
            ("code", "reason"),
            registry=registry,
        )
        self._queue = histogram("queue_seconds", "From the arrival until the request runs")
        self._first_token = histogram("time_to_first_token_seconds", "From the arrival to the first token")
        self._total = histogram("request_seconds", "From the arrival to the end")
        self._prompt = histogram("prompt_tokens", "Tokens of a prompt", LENGTH_BUCKETS)
        self._output = histogram("output_tokens", "Tokens of a request's output", LENGTH_BUCKETS)
        self._gaps = _Gaps(
            "tidegate_inter_token_latency_seconds", "Between two steps with output of a request"
        )
        registry.register(self._gaps)
        self._times: dict[Generation, _Times] = {}

    def on_open(self, generation: Generation) -> None:
        self._times[generation] = _Times(time.monotonic())

    def on_admitted(self, generation: Generation) -> None:
        times = self._times[generation]
        if not times.is_admitted:  # a second time where the engine was restarted
            times.is_admitted = True
            self._queue.observe(time.monotonic() - times.arrived)

    def on_tokens(self, generation: Generation, choice: int, now: float) -> None:
        if choice != 0:
            return  # several choices get theirs in one step, which is no latency
        times = self._times[generation]
        if times.last_tokens is None:
            self._first_token.observe(now - times.arrived)
        else:
            self._gaps.observe(now - times.last_tokens)
        times.last_tokens = now

    def on_progress(self, generation: Generation, choice: int, kind: ProgressKind) -> None:
        # A pause that the client asked for is no latency.
        if kind is ProgressKind.RESUMED and (times := self._times[generation]).last_tokens is not None:
            times.last_tokens = time.monotonic()

    def on_end(self, generation: Generation) -> None:
        times = self._times.pop(generation)
        end = generation.end
        match end:
            case Finished():
                # Of several choices, the first one's.
                code, reason = "OK", end.choices[0].reason.value
                self._prompt.observe(end.usage.prompt_tokens)
                self._output.observe(end.usage.output_tokens)
            case Failed():
                code, reason = end.failure.code.name, end.failure.reason
            case None:
                code, reason = grpc.StatusCode.CANCELLED.name, "client_left"
        self._ended.labels(code, reason).inc()
        self._total.observe(time.monotonic() - times.arrived)


class RpcMetrics:
    """What the guard tells of every RPC."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._ended = Counter("tidegate_rpcs", "RPCs that are over", ("method", "code"), registry=registry)
        self.active: dict[str, int] = {}
        """By method."""

    def began(self, method: str) -> None:
        self.active[method] = self.active.get(method, 0) + 1

    def ended(self, method: str, code: grpc.StatusCode) -> None:
        self.active[method] -= 1
        self._ended.labels(method, code.name).inc()


class _Gaps(Collector):
    """A histogram for what happens at every token: prometheus_client's own takes a lock each time."""

    def __init__(self, name: str, text: str) -> None:
        self._name, self._text = name, text
        self._counts = [0] * (len(TOKEN_BUCKETS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(TOKEN_BUCKETS, seconds)] += 1
        self._sum += seconds

    def collect(self) -> Iterator[Metric]:
        buckets = _buckets(TOKEN_BUCKETS, list(self._counts))
        yield HistogramMetricFamily(self._name, self._text, buckets=buckets, sum_value=self._sum)


class _EngineCollector(Collector):
    """The engine's totals and the state of queue and tiers, as of its last report."""

    def __init__(self, info: EngineInfo, hub: Hub, rpcs: RpcMetrics) -> None:
        self._info = info
        self._hub = hub
        self._admission = hub.admission
        self._rpcs = rpcs

    def collect(self) -> Iterator[Metric]:
        stats = self._hub.stats
        yield from self._queue(stats)
        yield from _tiers(stats)
        yield from _totals(stats)
        yield from _links(stats)
        yield from self._for_gateways(stats)

    def _queue(self, stats: Stats) -> Iterator[Metric]:
        yield _gauge("requests_waiting", "Requests in the queue", self._admission.waiting)
        yield _gauge("requests_waiting_tokens", "Their tokens to prefill", self._admission.waiting_tokens)
        states = GaugeMetricFamily(
            "tidegate_sequences", "Sequences in the engine, by state", labels=("state",)
        )
        for state in ("waiting", "running", "stalled", "swapped", "parked", "leased"):
            states.add_metric((state,), getattr(stats, state))
        yield states
        active = dict(self._rpcs.active)
        yield _gauge("sessions", "Sessions that are open", active.get(SESSION_METHOD, 0))
        rpcs = GaugeMetricFamily("tidegate_rpcs_active", "RPCs under way", labels=("method",))
        for method, number in active.items():
            rpcs.add_metric((method,), number)
        yield rpcs
        yield _counter("engine_restarts", "Engines that took the place of one that died", self._hub.restarts)
        yield _gauge("draining", "1 while the server takes nothing new", self._hub.is_draining)

    def _for_gateways(self, stats: Stats) -> Iterator[Metric]:
        """By the names that inference gateways and dashboards look for."""
        yield GaugeMetricFamily("vllm:num_requests_waiting", "As in vLLM", self._admission.waiting)
        yield GaugeMetricFamily("vllm:num_requests_running", "As in vLLM", stats.running)
        device = stats.device
        used = device.total - device.free - device.reclaimable
        yield GaugeMetricFamily("vllm:kv_cache_usage_perc", "As in vLLM", used / max(1, device.total))
        sizes = {
            "block_size": str(self._info.block_size),
            "num_gpu_blocks": str(self._info.device_blocks),
            "num_cpu_blocks": str(self._info.host_blocks),
        }
        yield InfoMetricFamily("vllm:cache_config", "As in vLLM", sizes)


def _tiers(stats: Stats) -> Iterator[Metric]:
    blocks = GaugeMetricFamily("tidegate_kv_blocks", "KV blocks, by state", labels=("tier", "state"))
    for name, tier in (("device", stats.device), ("host", stats.host)):
        for state, number in _states(tier).items():
            blocks.add_metric((name, state), number)
    yield blocks
    spare = GaugeMetricFamily(
        "tidegate_kv_blocks_reclaimable", "Used blocks that can go at once", labels=("tier",)
    )
    spare.add_metric(("device",), stats.device.reclaimable)
    spare.add_metric(("host",), stats.host.reclaimable)
    yield spare


def _states(tier: TierStats) -> dict[str, int]:
    """They sum to the tier's size."""
    known = {"free": tier.free, **tier.states}
    return {**known, "other": tier.total - sum(known.values())}


def _totals(stats: Stats) -> Iterator[Metric]:
    yield _counter("engine_steps", "Steps of the engine", stats.steps)
    yield _counter("scheduled_sequences", "Sequences in steps, summed up", stats.scheduled_sequences)
    yield _durations("step_seconds", "One step of the engine", stats.step_time)
    yield _counter("prefill_tokens", "Prompt tokens that were computed", stats.prompt_tokens)
    yield _counter("generated_tokens", "Output tokens", stats.output_tokens)
    yield _counter("recomputed_tokens", "Tokens that were computed a second time", stats.recomputed_tokens)
    yield _counter("parked_dropped", "Parked sequences whose KV was given up", stats.parked_dropped)
    hits = CounterMetricFamily(
        "tidegate_kv_hit_tokens", "Prompt tokens that a tier held already", labels=("tier",)
    )
    hits.add_metric(("device",), stats.prefix_hit_tokens - stats.prefix_host_hit_tokens)
    hits.add_metric(("host",), stats.prefix_host_hit_tokens)
    yield hits
    host_hits = CounterMetricFamily(
        "tidegate_kv_host_hit_tokens",
        "Tokens that came from the host tier, by who held them",
        labels=("class",),
    )
    host_hits.add_metric(("sequence",), stats.host_hit_tokens_resumed)
    host_hits.add_metric(("prefix",), stats.host_hit_tokens_prefix)
    yield host_hits
    modes = CounterMetricFamily("tidegate_preemptions", "Sequences that lost their room", labels=("mode",))
    modes.add_metric(("swap",), stats.preemptions_swap)
    modes.add_metric(("recompute",), stats.preemptions_recompute)
    yield modes
    yield _durations("preempt_stall_seconds", "From a preemption to the next step", stats.preempt_stall)
    yield _durations("resume_wait_seconds", "From being wanted again to the next step", stats.resume_wait)
    clean = stats.preempted_clean_blocks / max(1, stats.preempted_blocks)
    yield _gauge("kv_clean_at_preempt_ratio", "Full blocks that the host held already at preemption", clean)
    yield _counter("kv_thrash", "Blocks that came back soon after they had left", stats.thrashed_blocks)
    yield _counter("kv_failed_copies", "Copies between tiers that failed", stats.failed_copies)


def _links(stats: Stats) -> Iterator[Metric]:
    swapped = CounterMetricFamily(
        "tidegate_kv_swap_bytes", "KV copied between tiers", labels=("direction", "reason")
    )
    seconds = CounterMetricFamily("tidegate_kv_swap_seconds", "What it took", labels=("direction",))
    queue = GaugeMetricFamily("tidegate_kv_swap_queue_bytes", "Ordered, not arrived", labels=("direction",))
    use = GaugeMetricFamily(
        "tidegate_kv_link_utilization_ratio",
        "Share of the time that it carried something",
        labels=("direction",),
    )
    for direction, swaps in (("out", stats.swap_out), ("in", stats.swap_in)):
        for reason, number in swaps.bytes.items():
            swapped.add_metric((direction, reason), number)
        seconds.add_metric((direction,), swaps.seconds)
        queue.add_metric((direction,), swaps.queue_bytes)
        use.add_metric((direction,), swaps.utilization)
    yield from (swapped, seconds, queue, use)


def _durations(name: str, text: str, durations: Durations) -> HistogramMetricFamily:
    return HistogramMetricFamily(
        f"tidegate_{name}", text, buckets=_buckets(DURATION_BOUNDS, durations.counts), sum_value=durations.sum
    )


def _buckets(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, float]]:
    """Cumulative, as Prometheus wants them. ``counts`` has one more than ``bounds``."""
    names = [*map(str, bounds), "+Inf"]
    return list(zip(names, map(float, accumulate(counts)), strict=True))


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"tidegate_{name}", text, value)


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(f"tidegate_{name}", text, value)
