"""`moekit compress auto`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekit.cli.common import (
    Dtype,
    JsonOption,
    ModelArgument,
    Output,
    SeedOption,
    ThreadsOption,
    note,
    open_model,
    output,
    progress,
)
from moekit.cli.compress_finish import Destination, finish
from moekit.cli.compress_options import (
    BatchSizeOption,
    DataOption,
    EvalOption,
    MaxTokensOption,
    OutArgument,
    PlanOnlyOption,
    SeqLenOption,
    StatsOption,
)
from moekit.cli.compress_protect import protected_experts
from moekit.cli.formats import (
    CodecOption,
    Format,
    FormatOptions,
    GroupSizeOption,
    OverwriteOption,
    RestartOption,
)
from moekit.core.errors import UserError
from moekit.core.memory import bytes_of, format_bytes

if TYPE_CHECKING:
    from moekit.compress.auto.problem import CompressionProblem
    from moekit.compress.auto.search import Combination, Probe, SearchResult
    from moekit.core.load import LoadedModel
    from moekit.core.stats import ExpertStats

PROBE_BYTES = 8000
# Documents of the probe are drawn apart from those of the calibration.
PROBE_SEED = 1_000_003


def auto(
    model: ModelArgument,
    out: OutArgument = None,
    memory: Annotated[
        str | None,
        typer.Option(metavar="BYTES", help="Memory that running the result may take, as 6GiB."),
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(metavar="BYTES", help="In its place: bytes of the weights; repeatable."),
    ] = None,
    speed: Annotated[
        float | None,
        typer.Option(min=0.01, metavar="TOKENS/S", help="In its place: least speed of decoding."),
    ] = None,
    probes: Annotated[
        int, typer.Option(min=1, help="Combinations to measure beside each step alone.")
    ] = 30,
    probe: Annotated[
        list[str] | None,
        typer.Option(help="Text to measure the loss on; documents of --data unless given."),
    ] = None,
    probe_bytes: Annotated[
        int, typer.Option(min=1, help="Bytes of it, of each domain.")
    ] = PROBE_BYTES,
    protect: Annotated[
        list[str] | None,
        typer.Option(metavar="LAYER:EXPERT", help="An expert that stays in 16 bits; repeatable."),
    ] = None,
    stats: StatsOption = None,
    data: DataOption = None,
    max_tokens: MaxTokensOption = 50_000,
    seq_len: SeqLenOption = None,
    batch_size: BatchSizeOption = 8,
    to: Annotated[Format, typer.Option("--to", help="Format of OUT.")] = Format.packed,
    codec: CodecOption = None,
    group_size: GroupSizeOption = None,
    plan_only: PlanOnlyOption = None,
    evaluate: EvalOption = None,
    overwrite: OverwriteOption = False,
    restart: RestartOption = False,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Find the least harmful mix of steps for a budget.

    Tries removing and merging experts and rounding their weights, alone and together, on a probe
    text; prints what nothing beats in both size and loss, and writes the best within the budget.
    Without OUT and --plan-only nothing is written. Sizes are those of --to packed.
    """
    with output(as_json) as printed:
        goals = {"--memory": memory, "--size": size, "--speed": speed}
        given = [name for name, value in goals.items() if value]
        if len(given) != 1:
            raise UserError(f"give one of {', '.join(goals)}, not {' and '.join(given) or 'none'}")
        if not data and not (stats and probe):
            raise UserError("give --data, or --stats and --probe")
        if size and len(size) > 1 and (out is not None or plan_only is not None):
            raise UserError(
                f"{len(size)} budgets have {len(size)} picks: to write, give one --size"
            )
        # The codec's kind; its bits are what is searched for.
        formats = FormatOptions(
            to, codec=codec, group_size=group_size, overwrite=overwrite, restart=restart
        )
        destination = Destination(
            "auto", model, out, plan_only, formats, seed, threads, tuple(evaluate or ())
        )
        if out is not None or plan_only is not None:
            destination.check()
        loaded = open_model(model, Dtype.auto, seed, threads)
        protected = protected_experts(protect or [])
        collected = _stats(loaded, stats, tuple(data or ()), max_tokens, seq_len, batch_size, seed)
        problem = _problem(
            model, loaded, collected, probe or data or [], probe_bytes, formats, protected, seed
        )
        budgets, forecast = _budgets(model, problem, memory, size, speed, threads)
        result = _search(problem, budgets, probes)
        _print(printed, problem, result, forecast)
        summary = {
            "unchanged_bits_per_byte": problem.unchanged_loss,
            "front": [_row(one, forecast) for one in result.front],
            "picks": [
                {"budget": budget, **_row(pick, forecast)} for budget, pick in result.picks.items()
            ],
            "probes": len(result.probes),
        }
        if out is None and plan_only is None:
            printed.result(summary)
            return
        _write(printed, destination, problem, result.picks[budgets[0]], summary, data, stats)


def _stats(
    loaded: LoadedModel,
    stats: Path | None,
    data: tuple[str, ...],
    max_tokens: int | None,
    seq_len: int | None,
    batch_size: int,
    seed: int,
) -> ExpertStats:
    from moekit.compress.auto.problem import CompressionProblem
    from moekit.compress.calibrate import Calibration, stats_for

    # With --stats the --data is the probe's alone.
    texts = () if stats is not None else data
    where = Calibration(stats, texts, max_tokens, seq_len, batch_size, seed)
    with progress("profile", "batches") as advance:
        return stats_for(loaded, where, CompressionProblem.SETS, progress=advance)


def _problem(
    model: str,
    loaded: LoadedModel,
    stats: ExpertStats,
    texts: list[str],
    probe_bytes: int,
    formats: FormatOptions,
    protected: dict[int, set[int]],
    seed: int,
) -> CompressionProblem:
    from moekit.compress.auto.problem import CompressionProblem
    from moekit.core.codec_choice import DEFAULT_CODEC
    from moekit.core.load import find_model
    from moekit.core.packed import CodecChoice
    from moekit.core.view import MoEView
    from moekit.evaluate.quality import measure_quality
    from moekit.evaluate.text import limit_bytes_per_domain, read_texts, shuffled

    samples = limit_bytes_per_domain(shuffled(read_texts(texts), seed + PROBE_SEED), probe_bytes)

    def loss() -> float:
        return measure_quality(loaded.model, loaded.tokenizer, samples).mean

    kind = CodecChoice(
        formats.codec or DEFAULT_CODEC.name, formats.group_size or DEFAULT_CODEC.group_size
    )
    view = MoEView(loaded.model)
    return CompressionProblem(
        view, loaded.spec, stats, find_model(model), loss, kind, protected, seed
    )


Forecast = Callable[["Combination"], float]


def _budgets(
    model: str,
    problem: CompressionProblem,
    memory: str | None,
    size: list[str] | None,
    speed: float | None,
    threads: int | None,
) -> tuple[list[int], Forecast]:
    """Bytes that the weights may take, and the forecast of a combination's tokens a second."""
    import torch

    from moekit.core.load import find_model
    from moekit.runtime.forecast_decode import plan_decode
    from moekit.runtime.perf_model import decode_roofline

    base = plan_decode(find_model(model), threads=threads or torch.get_num_threads())

    def forecast(combination: Combination) -> float:
        """With every expert in memory."""
        load = dataclasses.replace(
            base.load,
            resident_bytes=problem.resident_bytes,
            expert_bytes=problem.mean_expert_bytes(combination),
        )
        return decode_roofline(load, base.machine, hit_rate=1.0).tokens_per_second

    if size:
        return [bytes_of(text) for text in size], forecast
    if memory is not None:
        needs = base.budget.needs
        beside = needs.total - needs.resident
        left = bytes_of(memory) - beside
        if left <= 0:
            raise UserError(
                f"--memory {memory}: the program, keys and values and scratch take "
                f"{format_bytes(beside)} alone"
            )
        note(f"{format_bytes(beside)} go to the program and the context, {format_bytes(left)} left")
        return [left], forecast
    assert speed is not None
    _check_speed(problem, forecast, speed)
    problem.accept = lambda combination: not combination or forecast(combination) >= speed
    fast = forecast(()) >= speed
    return [problem.size(()) if fast else problem.size(()) - 1], forecast


def _check_speed(problem: CompressionProblem, forecast: Forecast, speed: float) -> None:
    """Refuse a speed that no step reaches."""
    reached = {
        str(choice): forecast((choice,))
        for of_kind in problem.choices().values()
        for choice in of_kind
    }
    best = max(reached, key=lambda name: reached[name])
    if reached[best] < speed:
        raise UserError(
            f"--speed {speed:g}: no step gets beyond {reached[best]:.1f} tokens/s on this machine "
            f"({best})"
        )


def _search(problem: CompressionProblem, budgets: list[int], probes: int) -> SearchResult:
    from moekit.compress.auto.search import search

    choices = problem.choices()
    singles = sum(map(len, choices.values()))
    with progress("probe", "combinations") as advance:
        return search(problem, choices, budgets, probes=singles + 1 + probes, progress=advance)


def _row(probe: Probe, forecast: Forecast) -> dict[str, Any]:
    return {
        "steps": [dataclasses.asdict(choice) for choice in probe.combination],
        "label": str(probe),
        "bytes": probe.size,
        "increase": probe.increase,
        "tokens_per_second": forecast(probe.combination),
    }


def _print(
    printed: Output, problem: CompressionProblem, result: SearchResult, forecast: Forecast
) -> None:
    printed.line(f"unchanged: {problem.unchanged_loss:.4f} bits per byte of the probe")
    rows = [
        (
            str(one),
            format_bytes(one.size),
            f"{one.increase:+.4f}",
            f"{forecast(one.combination):.1f}",
        )
        for one in result.front
    ]
    printed.table(rows, ("front", "size", "bits/byte", "tokens/s"))
    for budget, pick in result.picks.items():
        printed.line(
            f"within {format_bytes(budget)}: {pick}, {format_bytes(pick.size)}, forecast "
            f"{pick.increase:+.4f} bits per byte and {forecast(pick.combination):.1f} tokens/s"
        )


def _write(
    printed: Output,
    destination: Destination,
    problem: CompressionProblem,
    pick: Probe,
    summary: dict[str, Any],
    data: list[str] | None,
    stats: Path | None,
) -> None:
    made = problem.made(pick.combination)
    formats = destination.formats
    if formats.to is Format.packed and "bits" not in made.plan.uses():
        # A packed model without bits in its plan would get those of the default codec.
        formats = dataclasses.replace(formats, codec="bf16")
    destination.formats = formats
    settings = {"method": str(pick), "data": data, "stats": None if stats is None else str(stats)}
    finish(printed, destination, made.plan, made.rewrite, data=settings, numbers=summary)
