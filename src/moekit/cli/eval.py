"""`moekit eval`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekit.cli.common import (
    DryRunOption,
    Dtype,
    DtypeOption,
    JsonOption,
    ModelArgument,
    Output,
    SeedOption,
    ThreadsOption,
    open_language_model,
    output,
    progress,
)
from moekit.core.errors import UserError

if TYPE_CHECKING:
    from moekit.evaluate.text import Sample

DEFAULT_CONTEXT = 512
# A domain's share of the part that --dry-run measures.
FORECAST_BYTES = 2000


def evaluate(
    model: ModelArgument,
    data: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[DATA]...",
            help='JSONL with "text", plain text, directories of both, or - for standard input. '
            "The domain is the file name up to its first dot.",
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=2, help="Tokens a window reads; 512 by default, or what the model can read."
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens between two windows; half a context by default."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows in one forward pass.")] = 16,
    max_bytes: Annotated[
        int | None,
        typer.Option("--max-bytes", min=1, help="Score only the leading bytes of each domain."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", help="Tasks of lm-eval instead of DATA, separated by commas."),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Directory with YAML tasks of your own.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before each question of a task.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions a task.")] = None,
    dry_run: DryRunOption = False,
    dtype: DtypeOption = Dtype.auto,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Measure bits per byte and perplexity, or run tasks.

    Every token of every document is scored once, in windows that do not cross documents; a token
    sees at least CONTEXT - STRIDE tokens before it, and the first one the end-of-text token. Bits
    per byte is the sum of nats / ln 2 / UTF-8 bytes of the text.
    """
    if bool(data) == bool(tasks):
        raise UserError("give either DATA, to measure bits per byte, or --tasks")
    if tasks and dry_run:
        raise UserError("--dry-run forecasts DATA only: lm-eval does not say how long a task takes")
    with output(as_json) as out:
        if tasks:
            options = {"num_fewshot": num_fewshot, "limit": limit, "batch_size": batch_size}
            names = [name.strip() for name in tasks.split(",") if name.strip()]
            _run_tasks(out, model, names, dtype, threads, seed, include_path, options)
        else:
            from moekit.evaluate.text import limit_bytes_per_domain, read_texts

            samples = read_texts(data or [])
            if max_bytes is not None:
                samples = limit_bytes_per_domain(samples, max_bytes)
            loaded = open_language_model(model, dtype, seed, threads)
            window = _window(loaded.model, context, stride)
            if dry_run:
                _forecast(out, loaded, samples, {**window, "batch_size": batch_size})
            else:
                _measure(out, model, loaded, samples, {**window, "batch_size": batch_size})


def _window(model: Any, context: int | None, stride: int | None) -> dict[str, Any]:
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    context = context or min(DEFAULT_CONTEXT, longest or DEFAULT_CONTEXT)
    return {"context": context, "stride": stride or max(1, context // 2)}


def _forecast(out: Output, loaded: Any, samples: list[Sample], window: dict[str, Any]) -> None:
    from moekit.core.forecast import Forecast
    from moekit.evaluate.bits_per_byte import bits_per_byte
    from moekit.evaluate.text import limit_bytes_per_domain

    few = limit_bytes_per_domain(samples, FORECAST_BYTES)
    start = time.perf_counter()
    part = bits_per_byte(loaded.model, loaded.tokenizer, few, **window).total
    elapsed = time.perf_counter() - start
    total = sum(len(sample.text.encode()) for sample in samples)
    details = {
        "documents": len(samples),
        "text_bytes": total,
        "tokens": round(part.tokens * total / part.bytes),
    }
    plan = Forecast.from_part(elapsed, 0, part.bytes / total, details, f"{part.bytes:,} bytes")
    out.table(plan.rows())
    out.result(plan.to_dict())


def _measure(
    out: Output, model: str, loaded: Any, samples: list[Sample], window: dict[str, Any]
) -> None:
    from moekit.evaluate.bits_per_byte import bits_per_byte

    start = time.perf_counter()
    with progress("eval", "windows") as update:
        result = bits_per_byte(loaded.model, loaded.tokenizer, samples, **window, progress=update)
    losses = {**result.per_domain, "all text": result.total}
    rows = [
        (name, loss.bytes, loss.tokens, f"{loss.bpb:.4f}", f"{loss.perplexity:.2f}")
        for name, loss in losses.items()
    ]
    out.table(rows, header=("domain", "bytes", "tokens", "bits/byte", "perplexity"))
    out.line(f"mean over {len(result.per_domain)} domains: {result.mean:.4f} bits per byte")
    if result.total.unknown_tokens:
        out.line(
            f"{result.total.unknown_tokens} unknown tokens: their bytes are lost, so these numbers "
            "do not compare with other tokenizers"
        )
    out.result(
        {
            "model": model,
            **window,
            "seconds": time.perf_counter() - start,
            **result.to_dict(),
        }
    )


def _run_tasks(
    out: Output,
    model: str,
    tasks: list[str],
    dtype: Dtype,
    threads: int | None,
    seed: int,
    include_path: Path | None,
    options: dict[str, Any],
) -> None:
    from moekit.evaluate.tasks import evaluate_tasks

    loaded = open_language_model(model, dtype, seed, threads)
    results = evaluate_tasks(
        loaded.model, loaded.tokenizer, tasks, include_path=include_path, seed=seed, **options
    )
    out.table(
        [
            (task, metric, f"{value:.4f}" if isinstance(value, float) else str(value))
            for task, metrics in results.items()
            for metric, value in metrics.items()
            if isinstance(value, int | float)
        ],
        header=("task", "metric", "value"),
    )
    out.result({"model": model, "tasks": results})
