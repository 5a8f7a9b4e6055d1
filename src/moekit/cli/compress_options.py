"""The options that the verbs of `moekit compress` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

OutArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="[OUT]",
        help="The directory (gguf: file) to write; appears when it is complete. Not with "
        "--plan-only.",
        show_default=False,
    ),
]
PlanOnlyOption = Annotated[
    Path | None,
    typer.Option(
        "--plan-only", metavar="FILE", help="Write the plan to FILE, a JSON file, and stop."
    ),
]
RatioOption = Annotated[
    float | None,
    typer.Option(min=0.0, max=1.0, help="Share of the experts of each layer that goes."),
]
ExpertsOption = Annotated[
    int | None, typer.Option("--experts", min=1, help="Experts that stay in each layer.")
]
SizeOption = Annotated[
    str | None,
    typer.Option("--size", metavar="SIZE", help="Bytes the weights may take at most, as 8GB."),
]
StatsOption = Annotated[
    Path | None,
    typer.Option(
        "--stats", metavar="DIR", help="Statistics of the model: a directory of moekit profile."
    ),
]
DataOption = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        help='In place of --stats: JSONL with "text", plain text, directories of both; repeatable.',
    ),
]
MaxTokensOption = Annotated[
    int | None,
    typer.Option(
        min=1, help="Read so many tokens of --data, drawn by --seed, an equal share per domain."
    ),
]
SeqLenOption = Annotated[
    int | None, typer.Option(min=1, help="Tokens read at a time; 512, or what the context holds.")
]
BatchSizeOption = Annotated[int, typer.Option(min=1, help="Sequences in one forward pass.")]
SaveStatsOption = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Keep the statistics collected from --data in DIR."),
]
EvalOption = Annotated[
    list[str] | None,
    typer.Option("--eval", help="Measure bits per byte of this text before and after; repeatable."),
]
