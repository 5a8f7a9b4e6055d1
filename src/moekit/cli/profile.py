"""`moekit profile`."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    set_up,
)
from moekit.core.errors import UserError
from moekit.evaluate.sequences import sequence_length, sequences

if TYPE_CHECKING:
    from moekit.core.collect import Batch
    from moekit.core.stats import ExpertStats
    from moekit.core.view import MoEView

DEFAULT_BATCH = 8
SHOWN = 10


def profile(
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
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="default (cheap), diagonal or full (moments of the experts' inputs), outputs "
            "(similarity of the experts' outputs), inputs (a sample of them), fisher (information "
            "of the weights, by backward passes); repeat for several. [default: default]",
            show_default=False,
        ),
    ] = None,
    all_tokens: Annotated[
        bool,
        typer.Option(
            "--all-tokens", help="Take input moments over every token in every expert, not routed."
        ),
    ] = False,
    layers: Annotated[
        str | None,
        typer.Option(help="Decoder layers of all sets but default, as 2,5; all by default."),
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Read weights from disk as each layer runs.")
    ] = False,
    memory: Annotated[
        str | None,
        typer.Option(help="With --stream: memory to stay within, as 8GB; decides the batch size."),
    ] = None,
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
    shuffle: Annotated[
        bool,
        typer.Option(
            "--shuffle", help="Draw the documents of --max-tokens by --seed, not the first ones."
        ),
    ] = False,
    min_tokens: Annotated[
        int, typer.Option(min=1, help="Report experts that fewer tokens chose.")
    ] = 32,
    add: Annotated[
        list[Path] | None,
        typer.Option(help="Add earlier stats of the same model to the result; repeatable."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Sequences in one forward pass; 8 by default.")
    ] = None,
    dry_run: DryRunOption = False,
    dtype: DtypeOption = Dtype.auto,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Measure what each expert does on a text."""
    with output(as_json) as printed:
        if memory is not None and not stream:
            raise UserError("--memory is a limit for --stream, which is not given")
        check_out(out)
        from moekit.core.memory import bytes_of
        from moekit.evaluate.text import read_texts, shuffled

        limit = None if memory is None else bytes_of(memory)
        texts = shuffled(read_texts(data), seed) if shuffle else read_texts(data)
        with _opened(model, dtype, seed, threads, stream, limit) as (view, tokenizer, streamed):
            from moekit.core.collect import pad_batches
            from moekit.core.record import FileHash, start_record
            from moekit.profile import SETS, shortfalls
            from moekit.profile.parallel import share_of, world

            config: Any = view.model.config
            if config.is_encoder_decoder:
                raise UserError(
                    f"{config.model_type} is an encoder-decoder, which text alone does not drive; "
                    "call moekit.profile.profile with decoder_input_ids in the batches"
                )
            wanted = sets or ["default"]
            unknown = [name for name in wanted if name not in SETS]
            if unknown:
                raise UserError(f"--set {unknown[0]}: there are {', '.join(SETS)}")
            length = sequence_length(config, seq_len)
            size = batch_size or (streamed.batch_size(length) if streamed else DEFAULT_BATCH)
            earlier = [_earlier(path, view) for path in add or ()]
            samples = list(sequences(tokenizer, texts, length, max_tokens))
            settings = {
                "model": model,
                "data": data,
                "sets": wanted,
                "all_tokens": all_tokens,
                "layers": layers,
                "stream": stream,
                "memory": limit,
                "seq_len": length,
                "max_tokens": max_tokens,
                "shuffle": shuffle,
                "min_tokens": min_tokens,
                "batch_size": size,
                "add": add,
                "dtype": str(dtype),
                "threads": threads,
                "seed": seed,
            }
            rank, processes = world()
            work = _Work(
                view,
                share_of(list(pad_batches(samples, size)), rank, processes),
                wanted,
                _positions(view, layers),
                all_tokens,
                seed,
            )
            if dry_run:
                if rank == 0:
                    _forecast(printed, work)
                return
            record = start_record(
                "profile", settings, seed=seed, inputs=[path for path in data if path != "-"]
            )
            stats = _write(work, out, earlier, settings, rank, processes)
            if stats is None:
                return
            rows = _layer_rows(stats, min_tokens)
            short = [asdict(s) for s in shortfalls(stats, min_tokens)]
            files = [FileHash.of(file, file.name) for file in sorted(out.iterdir())]
            record.finish({"layers": rows, "shortfalls": len(short)}, files).save(out)
            _report(printed, out, stats, rows, short, min_tokens, record.seconds)


@dataclass
class _Work:
    """What one process profiles; `layers` are positions in the view, for the heavy sets."""

    view: MoEView
    batches: list[Batch]
    sets: list[str]
    layers: list[int] | None
    all_tokens: bool
    seed: int

    def run(
        self, scratch: Path | None = None, stop: int | None = None, update: Any = None
    ) -> ExpertStats:
        """Profile the first `stop` batches, or all; `update` gets (forwards done, all)."""
        from moekit.profile import profile

        return profile(
            self.view,
            self.batches[:stop],
            sets=self.sets,
            layers=self.layers,
            all_tokens=self.all_tokens,
            seed=self.seed,
            scratch=scratch,
            progress=update,
        )


def _write(
    work: _Work,
    out: Path,
    earlier: list[ExpertStats],
    settings: dict[str, Any],
    rank: int,
    processes: int,
) -> ExpertStats | None:
    """Profile, bring the processes' parts together and save; None in all but the first."""
    from moekit.core.stats import ExpertStats, merge_all
    from moekit.profile.parallel import discard_parts, reduce_stats

    scratch = out.with_name(f"{out.name}.scratch-{rank}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        with progress("profile", "batches") as update:
            stats: ExpertStats | None = work.run(scratch, update=update if rank == 0 else None)
        assert stats is not None
        if processes > 1:
            stats = reduce_stats(stats, out, rank, processes)
        if stats is not None:
            stats = merge_all([*earlier, stats])
            stats.metadata = {key: settings[key] for key in ("model", "data", "seq_len", "seed")}
            stats.save(out)
            discard_parts(out, processes)
            # What was merged lazily reads files that are gone by now.
            stats = ExpertStats.open(out)
        return stats
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(
            f"interrupted: {out} was not written; run the command again"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _forecast(printed: Output, work: _Work) -> None:
    """Profile the first batch and scale what it took to all of them."""
    from moekit.core.forecast import Forecast
    from moekit.core.stats_table import STATISTICS

    start = time.perf_counter()
    stats = work.run(stop=1)
    elapsed = time.perf_counter() - start
    held = sum(
        math.prod(value.shape) * STATISTICS[name].dtype.itemsize
        for (_, name), value in stats.held.items()
    )
    # The sums are as large after one batch as after all of them.
    plan = Forecast(
        held,
        round(elapsed * len(work.batches), 1),
        "measured on the first batch",
        {"batches": len(work.batches)},
    )
    printed.table(plan.rows())
    printed.result(plan.to_dict())


@contextmanager
def _opened(
    model: str, dtype: Dtype, seed: int, threads: int | None, stream: bool, limit: int | None
) -> Iterator[tuple[MoEView, Any, Any]]:
    """The view, the tokenizer, and the streamed model if it is one."""
    if not stream:
        loaded = open_model(model, dtype, seed, threads)
        from moekit.core.view import MoEView
        from moekit.profile.align import align_weights

        align_weights(loaded.model)
        yield MoEView(loaded.model), loaded.tokenizer, None
        return
    from moekit.core.load import load_tokenizer, local_directory

    directory = local_directory(model)
    set_up(seed, threads)
    import torch

    from moekit.core.spec import MoESpec
    from moekit.profile.stream import StreamedModel

    MoESpec.from_dir(directory)
    tokenizer = load_tokenizer(directory)
    if tokenizer is None:
        raise UserError(f"{model} has no tokenizer, so it cannot read text")
    number_format = None if dtype is Dtype.auto else getattr(torch, dtype.value)
    with StreamedModel(directory, dtype=number_format, memory=limit) as streamed:
        yield streamed.view, tokenizer, streamed


def _earlier(path: Path, view: MoEView) -> ExpertStats:
    from moekit.core.spec import spec_of
    from moekit.core.stats import ExpertStats

    stats = ExpertStats.open(path)
    try:
        model: Any = view.model
        stats.validate(spec_of(model))
    except UserError as error:
        raise UserError(f"--add {path}: {error}") from error
    return stats


def _positions(view: MoEView, text: str | None) -> list[int] | None:
    """Positions in the view of decoder layers given as "2,5"."""
    if text is None:
        return None
    position_of = {layer.index: layer.position for layer in view}
    parts = [part.strip() for part in text.split(",")]
    wrong = [part for part in parts if not part.isdigit() or int(part) not in position_of]
    if wrong:
        known = ", ".join(map(str, position_of))
        raise UserError(f"--layers {text}: {wrong[0]!r} is no MoE layer; there are {known}")
    return [position_of[int(part)] for part in parts]


def _layer_rows(stats: ExpertStats, min_tokens: int) -> list[dict[str, int | float]]:
    rows = []
    for position, layer in enumerate(stats.layers):
        if not stats.has(position, "count"):
            continue
        counts = stats.counts(position)[: layer.num_experts].double()
        rows.append(
            {
                "layer": layer.index,
                "num_experts": layer.num_experts,
                "tokens": stats.num_tokens(position),
                "imbalance": float(counts.max() / counts.mean()) if counts.sum() else 0.0,
                "short": int((counts < min_tokens).sum()),
                "never_chosen": int((counts == 0).sum()),
            }
        )
    return rows


def _report(
    printed: Output,
    out: Path,
    stats: ExpertStats,
    rows: list[dict[str, int | float]],
    short: list[dict[str, Any]],
    min_tokens: int,
    seconds: float,
) -> None:
    tokens = max((int(row["tokens"]) for row in rows), default=0)
    held = sorted({name for _, name in stats.held})
    printed.line(
        f"{out}: {len(held)} statistics of {len(stats.layers)} MoE layers"
        + (f" over {tokens} tokens in {len(stats.domains)} domains" if rows else "")
    )
    printed.table(
        [
            (r["layer"], r["num_experts"], f"{r['imbalance']:.2f}", r["short"], r["never_chosen"])
            for r in rows
        ],
        header=("layer", "experts", "max/mean load", f"below {min_tokens}", "never chosen"),
    )
    for row in short[:SHOWN]:
        printed.line(
            f"layer {row['layer']} expert {row['expert']}: {row['tokens']} tokens; {row['reason']}"
        )
    if len(short) > SHOWN:
        printed.line(f"... and {len(short) - SHOWN} more below {min_tokens} tokens (all in --json)")
    printed.result(
        {
            "out": str(out),
            "tokens": tokens,
            "domains": stats.domains,
            "statistics": held,
            "layers": rows,
            "min_tokens": min_tokens,
            "shortfalls": short,
            "seconds": seconds,
        }
    )
