"""What /metrics says, in Prometheus' text format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from moekit.serve.service import Service
from moekit.serve.statistics import Histogram

Labels = Mapping[str, object]


class Page:
    """Metrics one after another, each with its help and type."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(self, name: str, kind: str, text: str, values: Iterable[tuple[Labels, float]]) -> None:
        """One metric with a value for each set of labels."""
        self._open(name, kind, text)
        self._lines += [f"moekit_{name}{_written(labels)} {value}" for labels, value in values]

    def counter(self, name: str, text: str, value: float) -> None:
        """A number that only grows."""
        self.add(name, "counter", text, [({}, value)])

    def gauge(self, name: str, text: str, value: float) -> None:
        """A number as it is now."""
        self.add(name, "gauge", text, [({}, value)])

    def histogram(self, name: str, text: str, found: Histogram) -> None:
        """Observations by size."""
        self._open(name, "histogram", text)
        counts = found.cumulative
        for bound, count in zip([*found.bounds, "+Inf"], counts, strict=True):
            self._lines.append(f"moekit_{name}_bucket{_written({'le': bound})} {count}")
        self._lines += [f"moekit_{name}_sum {found.total}", f"moekit_{name}_count {counts[-1]}"]

    def _open(self, name: str, kind: str, text: str) -> None:
        self._lines += [f"# HELP moekit_{name} {text}", f"# TYPE moekit_{name} {kind}"]

    @property
    def text(self) -> str:
        """The whole page."""
        return "\n".join(self._lines) + "\n"


def metrics(service: Service, requests: Counter[tuple[str, int]]) -> str:
    """The page for a service and its answered requests, counted by route and status."""
    done, engine, scheduler = service.scheduler.statistics, service.engine.stats, service.scheduler
    page = Page()
    answered = [({"route": r, "status": s}, n) for (r, s), n in sorted(requests.items())]
    page.add("requests_total", "counter", "Answered requests.", answered)
    ended = [({"reason": reason}, count) for reason, count in sorted(done.sequences.copy().items())]
    page.add("sequences_total", "counter", "Ended sequences by reason.", ended)
    page.gauge("streams", "Sequences that have a slot.", scheduler.running)
    page.gauge("streams_limit", "Slots.", service.limits.streams)
    page.gauge("queue", "Sequences that wait for a slot.", scheduler.queued)
    page.gauge("queue_limit", "Sequences that may wait.", service.limits.queue)
    page.counter("prompt_tokens_total", "Tokens of prompts.", done.prompt_tokens)
    page.counter(
        "reused_tokens_total", "Tokens of prompts found in a slot's cache.", done.reused_tokens
    )
    page.counter("generated_tokens_total", "Tokens generated.", done.generated_tokens)
    page.gauge(
        "tokens_per_second",
        "Tokens generated per second, over the last ten seconds.",
        done.tokens_per_second,
    )
    page.histogram("step_seconds", "Time of a step of the model.", done.step_seconds)
    page.histogram(
        "first_token_seconds", "Time to the first token, queue included.", done.first_token_seconds
    )
    page.counter("expert_hits_total", "Experts asked for that were in memory.", engine.hits)
    page.counter("expert_misses_total", "Experts asked for that had to be read.", engine.misses)
    page.gauge("expert_hit_rate", "Share of experts that were in memory.", engine.hit_rate)
    page.counter("expert_read_bytes_total", "Bytes of experts read.", engine.bytes_read)
    page.gauge("peak_memory_bytes", "Most memory the process has held.", engine.peak_bytes)
    return page.text


def _written(labels: Labels) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{value}"' for name, value in labels.items()) + "}"
