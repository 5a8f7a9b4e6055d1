"""`moekit run` with an engine: the memory table before, what was read and how fast after."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from moekit.cli.common import Dtype, Output, note, set_up, table_lines
from moekit.cli.engine import opened_engine
from moekit.core.errors import UserError
from moekit.core.memory import format_bytes

if TYPE_CHECKING:
    from transformers import BatchEncoding

    from moekit.runtime.budget import Budget
    from moekit.runtime.engine import Engine
    from moekit.runtime.forecast_batch import Requests
    from moekit.runtime.forecast_decode import DecodePlan
    from moekit.runtime.generate import Generation


class EngineSpeaker:
    """An engine that generates text, and what was forecast of it."""

    def __init__(self, engine: Engine, seed: int, plan: DecodePlan | None, routing: str) -> None:
        self.engine, self.tokenizer = engine, engine.tokenizer
        self._seed, self._plan, self._routing = seed, plan, routing

    def generate(self, encoded: BatchEncoding, **options: Any) -> Generation:
        """Continue one encoded prompt; what the experts cost is noted."""
        from moekit.runtime.generate import generate_with_engine

        done = generate_with_engine(self.engine, encoded, seed=self._seed, **options)
        stats = self.engine.stats
        if self.engine.cache is not None:
            note(
                f"[experts: {stats.hit_rate:.1%} of {stats.hits + stats.misses} in memory, "
                f"{format_bytes(stats.bytes_read)} read; peak {format_bytes(stats.peak_bytes)}]"
            )
        if self.engine.gpu_budget is not None:
            note(
                f"[GPU: {format_bytes(stats.bytes_copied)} of experts copied to it; peak of "
                f"tensors {format_bytes(stats.peak_gpu_bytes)}]"
            )
        if self._plan is not None:
            # Steps with everything in memory count no hits.
            rate = 1.0 if self._plan.budget.complete else stats.hit_rate
            note(
                f"[forecast {self._plan.forecast.tokens_per_second:.1f} tokens/s where routing "
                f"{self._routing}, {self._plan.at(rate).tokens_per_second:.1f} for this share in "
                f"memory; measured {done.tokens_per_second:.1f}]"
            )
        return done

    def account(self) -> dict[str, Any]:
        """Memory and experts, for --json."""
        stats = self.engine.stats
        values: dict[str, Any] = {
            **asdict(stats),
            "hit_rate": stats.hit_rate,
            "ms_per_token": stats.ms_per_token,
        }
        if self.engine.budget is not None:
            values["memory"] = self.engine.budget.to_dict()
        if self.engine.gpu_budget is not None:
            values["gpu_memory"] = self.engine.gpu_budget.to_dict()
        if self._plan is not None:
            values["forecast"] = self._plan.to_dict()
        return {"engine": values}


@contextmanager
def opened(
    model: str, options: dict[str, Any], dtype: Dtype, seed: int, threads: int | None
) -> Iterator[EngineSpeaker]:
    """The engine for `options`, with its memory table on standard error; closed at the end."""
    from moekit.core.load import resolve_model

    resolve_model(model)
    set_up(seed, threads)
    plan = None
    if "memory" in options and options.get("device", "cpu") == "cpu":
        # Before anything is loaded: its probe of the memory would count on top. What does not fit
        # is refused by the engine, which knows the sizes exactly.
        with suppress(UserError):
            plan = _plan(model, options, threads)
    with opened_engine(model, {**options, "streams": 1}, dtype, threads) as engine:
        for line in engine.notes:
            note(line)
        for budget in (engine.budget, engine.gpu_budget):
            if budget is not None:
                note("\n".join(table_lines(_rows(budget))))
        yield EngineSpeaker(engine, seed, plan, _routing(options))


def forecast(
    model: str,
    options: dict[str, Any],
    threads: int | None,
    out: Output,
    requests: str | None = None,
) -> None:
    """Print what a run would take and how fast it would be, and what a server would do with
    `requests`; nothing is loaded."""
    if options.get("device", "cpu") != "cpu":
        raise UserError("--dry-run forecasts runs on the processor: leave out --device")
    set_up(0, threads)
    asked = None
    if requests is not None:
        # Before anything is printed.
        from moekit.runtime.forecast_batch import Requests

        asked = Requests.parse(requests)
    plan = _plan(model, options, threads)
    for line in plan.notes:
        out.line(line)
    out.table(_rows(plan.budget))
    machine, made = plan.machine, plan.forecast
    out.line(
        f"measured: memory {machine.memory_bandwidth / 1e9:.1f} GB/s, disk "
        f"{machine.disk_bandwidth / 1e9:.2f} GB/s"
    )
    out.line(
        f"forecast: {made.tokens_per_second:.1f} tokens/s for one sequence where routing "
        f"{_routing(options)} ({plan.hit_rate:.0%} of experts in memory), bound by {made.bound}; "
        f"{plan.at((1 + plan.hit_rate) / 2).tokens_per_second:.1f} if half of the others are there"
    )
    found = {"dry_run": True, **plan.to_dict()}
    if asked is not None:
        found["server"] = _server(plan, asked, threads, out)
    out.result(found)


def _routing(options: dict[str, Any]) -> str:
    return "never repeats itself" if options.get("trace") is None else "is as in the trace"


def _server(plan: DecodePlan, asked: Requests, threads: int | None, out: Output) -> dict[str, Any]:
    """What MoE-Lens forecasts of many requests."""
    import torch

    from moekit.runtime.forecast_batch import compute_rate, plan_server

    made = plan_server(plan, asked, compute_rate(threads or torch.get_num_threads()))
    each = f"{asked.prompt} tokens answered with {asked.generated}"
    out.line(f"{made.streams} sequences that decode together: {made.decoding:.1f} tokens/s")
    out.line(
        f"requests of {each}: {made.some.generated_per_second:.1f} tokens/s generated for "
        f"{asked.count}, {made.endless.generated_per_second:.1f} for any number, bound by "
        f"{made.endless.bound}"
    )
    return made.to_dict()


def _plan(model: str, options: dict[str, Any], threads: int | None) -> DecodePlan:
    import torch

    from moekit.core.load import find_model
    from moekit.core.memory import bytes_of
    from moekit.runtime.forecast_decode import plan_decode

    names = ("codec", "resident_codec", "runner", "max_context", "streams", "policy", "trace")
    memory, cache = options.get("memory", "auto"), options.get("expert_cache")
    return plan_decode(
        find_model(model),
        None if memory == "auto" else bytes_of(memory),
        expert_cache=None if cache is None else bytes_of(cache),
        threads=threads or torch.get_num_threads(),
        **{name: options[name] for name in names if name in options},
    )


def _rows(budget: Budget) -> list[tuple[str, str, str]]:
    return [(name, format_bytes(count), text) for name, count, text in budget.rows()]
