"""`moekit compress task-vector`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moekit.cli.common import JsonOption, NoSeedOption, output, progress
from moekit.core.memory import format_bytes


def task_vector(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="The fine-tune.", show_default=False)
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The directory to write.", show_default=False)
    ],
    base: Annotated[
        str, typer.Option("--base", metavar="MODEL", help="What MODEL was fine-tuned from.")
    ],
    density: Annotated[
        float, typer.Option(help="Share of the largest entries of the whole model that stay.")
    ] = 0.1,
    alpha: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Size of what stays, in standard deviations of all entries; by default its own "
            "mean, which loses least.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at OUT.")] = False,
    seed: NoSeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Write a fine-tune as signs over its base (ComPEFT).

    OUT can be named as a model in recipes of moekit merge, which writes it out whole again.
    """
    with output(as_json) as printed:
        from moekit.merge.compeft import compress_task_vector

        with progress("compress", "tensors") as update:
            done = compress_task_vector(
                model,
                base,
                out,
                density=density,
                alpha=alpha,
                overwrite=overwrite,
                progress=update,
            )
        printed.line(
            f"{out}: {done.kept:,} of {done.entries:,} entries by {done.size:.3g}, "
            f"{format_bytes(done.bytes)}, {done.bits:.3f} bits an entry (at least "
            f"{done.entropy:.3f}); {done.error:.0%} of the squares are lost"
        )
        printed.result(
            {
                "out": str(out),
                "entries": done.entries,
                "kept": done.kept,
                "size": done.size,
                "bytes": done.bytes,
                "bits_per_entry": done.bits,
                "entropy": done.entropy,
                "error": done.error,
            }
        )
