"""`moekit trace`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moekit.cli.common import (
    DryRunOption,
    Dtype,
    DtypeOption,
    JsonOption,
    ModelArgument,
    OutOption,
    Output,
    SeedOption,
    ThreadsOption,
    check_out,
    open_model,
    output,
    progress,
)
from moekit.evaluate.sequences import sequence_length, sequences

if TYPE_CHECKING:
    from moekit.core.collect import Batch, Sink
    from moekit.core.trace import RoutingTrace


def trace(
    model: ModelArgument,
    data: Annotated[
        list[str],
        typer.Argument(
            metavar="DATA...",
            help='JSONL with "text", plain text, directories of both, or - for standard input. '
            "The domain is the file name up to its first dot.",
        ),
    ],
    out: OutOption,
    seq_len: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Cut documents into sequences of so many tokens; 512 by default, or what the "
            "context holds.",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Read so many tokens, an equal share from each domain."),
    ] = None,
    generate: Annotated[
        int | None,
        typer.Option(min=1, help="Continue every sequence by so many tokens and record them too."),
    ] = None,
    do_sample: Annotated[
        bool, typer.Option("--do-sample", help="Draw the tokens of --generate.")
    ] = False,
    logits: Annotated[bool, typer.Option("--logits", help="Record the router logits too.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences in one forward pass.")] = 8,
    dry_run: DryRunOption = False,
    dtype: DtypeOption = Dtype.auto,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Record what the routers choose on a text."""
    with output(as_json) as printed:
        check_out(out)
        from moekit.evaluate.text import read_texts

        texts = read_texts(data)
        loaded = open_model(model, dtype, seed, threads)

        length = sequence_length(loaded.model.config, seq_len, generate)
        options = {"max_new_tokens": generate, "do_sample": do_sample} if generate else None
        work = _Pass(
            loaded.model,
            list(sequences(loaded.tokenizer, texts, length, max_tokens)),
            batch_size,
            logits,
            options,
        )
        if dry_run:
            _forecast(printed, work)
            return
        settings = {
            "model": model,
            "data": data,
            "seq_len": length,
            "max_tokens": max_tokens,
            "generate": options,
            "logits": logits,
            "batch_size": batch_size,
            "dtype": str(dtype),
            "threads": threads,
        }
        _write(printed, out, work, settings, seed)


@dataclass
class _Pass:
    """One pass of a model over sequences of (token ids, domain); `generate` as in `collect`."""

    model: Any
    sequences: list[tuple[list[int], str]]
    batch_size: int
    logits: bool
    generate: dict[str, Any] | None

    def run(self, sink: Sink, stop: int | None = None, update: Any = None) -> None:
        """Feed the first `stop` sequences, or all, to the sink; `update` gets (done, total)."""
        from moekit.core.collect import collect, pad_batches
        from moekit.core.view import MoEView

        side: Literal["left", "right"] = "left" if self.generate else "right"
        batches = pad_batches(self.sequences[:stop], self.batch_size, side=side)
        if update is not None:
            batches = _counted(batches, len(self.sequences), update)
        view = MoEView(self.model)
        collect(view, batches, [sink], logits=self.logits, generate=self.generate)


def _write(printed: Output, out: Path, work: _Pass, settings: dict[str, Any], seed: int) -> None:
    from moekit.core.record import FileHash, start_record
    from moekit.core.trace_writer import TraceWriter

    texts = [path for path in settings["data"] if path != "-"]
    record = start_record("trace", settings, seed=seed, inputs=texts)
    writer = TraceWriter(out, logits=work.logits, metadata={**settings, "seed": seed})
    try:
        with progress("trace", "sequences") as update:
            work.run(writer, update=update)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(
            f"interrupted: {out} was not written; run the command again, or remove {out}.partial"
        ) from error
    layers = [_load(writer.trace, position) for position in range(len(writer.trace.layers))]
    files = [FileHash.of(file, file.name) for file in sorted(out.iterdir())]
    record.finish({"tokens": len(writer.trace), "layers": layers}, files).save(out)
    _report(printed, out, writer.trace, layers, record.seconds)


def _forecast(printed: Output, work: _Pass) -> None:
    """Trace the first batch in memory and scale what it took to all tokens."""
    from moekit.core.forecast import Forecast
    from moekit.core.trace_files import MemoryChunk
    from moekit.core.trace_writer import TraceWriter

    writer = TraceWriter(logits=work.logits)
    start = time.perf_counter()
    work.run(writer, stop=work.batch_size)
    elapsed = time.perf_counter() - start
    held = sum(
        tensor.nbytes
        for chunk in writer.trace.chunks
        if isinstance(chunk, MemoryChunk)
        for tensor in chunk.tensors.values()
    )
    done, total = (
        sum(len(ids) for ids, _ in sequences)
        for sequences in (work.sequences[: work.batch_size], work.sequences)
    )
    details = {
        "sequences": len(work.sequences),
        "tokens": round(len(writer.trace) * total / done),
    }
    plan = Forecast.from_part(elapsed, held, done / total, details, "the first batch")
    printed.table(plan.rows())
    printed.result(plan.to_dict())


def _counted(batches: Iterable[Batch], total: int, update: Any) -> Iterator[Batch]:
    done = 0
    for batch in batches:
        yield batch
        done += len(batch.ids)
        update(done, total)


def _report(
    printed: Output,
    out: Path,
    trace: RoutingTrace,
    layers: list[dict[str, int | float]],
    seconds: float,
) -> None:
    from moekit.core.trace import DECODE

    decoded = int((trace.phase == DECODE).sum())
    printed.line(
        f"{out}: {len(trace)} tokens ({decoded} decoded) of {len(trace.samples)} sequences in "
        f"{len(trace.domains)} domains, {len(trace.layers)} MoE layers"
    )
    printed.table(
        [
            (row["layer"], row["num_experts"], f"{row['imbalance']:.2f}", row["dead"])
            for row in layers
        ],
        header=("layer", "experts", "max/mean load", "never chosen"),
    )
    printed.result(
        {
            "out": str(out),
            "tokens": len(trace),
            "decoded": decoded,
            "sequences": len(trace.samples),
            "domains": trace.domains,
            "seconds": seconds,
            "layers": layers,
        }
    )


def _load(trace: RoutingTrace, position: int) -> dict[str, int | float]:
    """Load of one layer: the busiest expert over the mean, and experts never chosen."""
    import torch

    layer = trace.layers[position]
    counts = torch.zeros(layer.num_choices, dtype=torch.long)
    for start, stop in trace.spans():
        ids = trace.layer(position, start, stop).topk_ids.flatten()
        counts += torch.bincount(ids[ids >= 0], minlength=layer.num_choices)
    # Choices beyond the experts have no weights: nothing runs there, so they carry no load.
    counts = counts[: layer.num_experts]
    mean = counts.double().mean()
    return {
        "layer": layer.index,
        "num_experts": layer.num_experts,
        "imbalance": float(counts.max() / mean) if mean else 0.0,
        "dead": int((counts == 0).sum()),
    }
