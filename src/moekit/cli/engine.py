"""The options of an engine, for the verbs that open one, and opening it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekit.cli.common import Dtype, note, progress
from moekit.core.errors import UserError

if TYPE_CHECKING:
    from moekit.runtime.engine import Engine

MemoryOption = Annotated[
    str | None,
    typer.Option(
        metavar="BYTES|auto",
        help="Limit of the process's memory, as 6GiB; experts beyond it stay on disk.",
    ),
]
ExpertCacheOption = Annotated[
    str | None, typer.Option(metavar="BYTES", help="Of it, what experts may take at most.")
]
CodecOption = Annotated[
    str | None,
    typer.Option(
        help="Pack the experts with this codec first (moekit list --kind codec), or auto."
    ),
]
ResidentCodecOption = Annotated[
    str | None, typer.Option(help="Also encode what is not an expert, such as attention; lossy.")
]
PolicyOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME[:OPTION=VALUE,...]",
        help="Which experts stay in memory (moekit list --kind policy).",
    ),
]
PredictorOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME[:OPTION=VALUE,...]|DIR",
        help="What is read ahead (moekit list --kind predictor), or a saved predictor.",
    ),
]
TraceOption = Annotated[
    Path | None,
    typer.Option(
        metavar="TRACE",
        help="Routing of the model (moekit trace) that a predictor, the policy hot-set and the "
        "forecast learn from.",
    ),
]
SlotsOption = Annotated[
    bool | None,
    typer.Option(
        "--slots-per-layer/--shared-slots",
        help="Whether every layer has expert slots of its own; shared by default.",
    ),
]
PrefetchOption = Annotated[
    bool | None, typer.Option("--prefetch/--no-prefetch", help="Whether to read experts ahead.")
]
DeviceOption = Annotated[
    str | None,
    typer.Option(metavar="cpu|cuda|cuda:N", help="Where the model runs; the processor by default."),
]
GpuMemoryOption = Annotated[
    str | None,
    typer.Option(
        metavar="BYTES|auto",
        help="Limit of the GPU's memory, with --device cuda; experts beyond it stay in RAM.",
    ),
]
SchedulerOption = Annotated[
    str | None,
    typer.Option(
        metavar="on-demand|hybrimoe|fiddler|static-split",
        help="Who computes experts that the GPU lacks: the GPU, or also the processor.",
    ),
]
ShareOption = Annotated[
    str | None,
    typer.Option(
        metavar="des-vote|des-seq[:OPTION=VALUE,...]",
        help="Sequences that decode together choose from one small set of experts; lossy.",
    ),
]
LowBitOption = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=1.0,
        metavar="WEIGHT",
        help="Experts that are not in memory and have at most this router weight run from their "
        "first bit plane; for nested codecs; lossy.",
    ),
]
MaxContextOption = Annotated[
    int | None, typer.Option(min=2, help="Tokens of prompt and answer that memory is kept for.")
]


class RunnerName(StrEnum):
    """What computes: native code for the common shapes, or transformers' modules."""

    auto = "auto"
    native = "native"
    graph = "graph"


RunnerOption = Annotated[
    RunnerName, typer.Option(help="Native code for the common shapes, or the model's own modules.")
]


def engine_options(*, runner: RunnerName, **given: Any) -> dict[str, Any]:
    """Arguments of `open_engine`: the options that were given."""
    options = {name: value for name, value in given.items() if value is not None}
    return {**options, "runner": runner.value} if runner is not RunnerName.auto else options


def needs_engine(model: str, options: dict[str, Any]) -> bool:
    """Whether an option of the engine was given, or the model is packed."""
    from moekit.core.load import PACKED_FILE

    return bool(options) or (Path(model).expanduser() / PACKED_FILE).is_file()


@contextmanager
def opened_engine(
    model: str, options: dict[str, Any], dtype: Dtype, threads: int | None
) -> Iterator[Engine]:
    """The engine for `options`, packing shown on standard error; closed at the end.

    Raises UserError as `open_engine` does, and for a model that cannot read text.
    """
    import moekit

    with progress("packing", "B") as update:
        engine = moekit.open_engine(
            model,
            threads=threads,
            dtype=None if dtype is Dtype.auto else dtype.value,
            progress=update,
            note=note,
            **options,
        )
    with engine:
        if engine.tokenizer is None:
            raise UserError(f"{model} has no tokenizer, so it cannot read text")
        yield engine
