"""`moekit compress library`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moekit.cli.common import (
    Dtype,
    JsonOption,
    ModelArgument,
    SeedOption,
    ThreadsOption,
    check_out,
    open_model,
    output,
    progress,
)
from moekit.cli.compress_options import (
    BatchSizeOption,
    DataOption,
    MaxTokensOption,
    SeqLenOption,
    StatsOption,
)


def library(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The JSON file to write.")],
    method: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="The score that orders experts (`moekit list --kind saliency`)."
        ),
    ] = "tcess",
    stats: StatsOption = None,
    data: DataOption = None,
    max_tokens: MaxTokensOption = None,
    seq_len: SeqLenOption = None,
    batch_size: BatchSizeOption = 8,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Write down which experts each of several tasks needs.

    Every domain of the text, or of the statistics, is a task. moekit compress prune --library
    keeps the experts of one, named or found by a text.
    """
    with output(as_json) as printed:
        check_out(out)
        from moekit.compress.calibrate import Calibration, open_stats, stats_for
        from moekit.compress.prune.library import TaskLibrary
        from moekit.core.load import find_config
        from moekit.core.registry import registry
        from moekit.core.spec import spec_from_config

        registry.find(method, kind="saliency")
        calibration = Calibration(stats, tuple(data or ()), max_tokens, seq_len, batch_size, seed)
        if calibration.stats is not None:
            spec = spec_from_config(find_config(model))
            collected = open_stats(calibration.stats, spec, ["default"])
        else:
            loaded = open_model(model, Dtype.auto, seed, threads)
            with progress("profile", "batches") as advance:
                collected = stats_for(loaded, calibration, progress=advance)
        made = TaskLibrary.of(collected, method)
        made.save(out)
        tokens = {name: collected.num_tokens(0, name) for name in made.tasks}
        printed.table(list(tokens.items()), header=("task", "tokens"))
        printed.line(f"wrote {out}")
        printed.result({"out": str(out), "method": method, "tasks": tokens})
