"""`moekit compress code`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from moekit.cli.common import JsonOption, NoSeedOption, check_out, output, progress


def code(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", help="A packed model of ternary rows; with --expand a coded one."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write.")],
    expand: Annotated[
        bool, typer.Option("--expand", help="Give back the packed model, every file as it was.")
    ] = False,
    seed: NoSeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Write ternary experts below one bit a weight.

    MODEL is what moekit compress quantize --codec ternary-rows --to packed writes. The code is
    lossless and for keeping: expand it to run it.
    """
    with output(as_json) as printed:
        check_out(out)
        from moekit.compress.quantize import coded_files

        with progress("expand" if expand else "code", "layers") as advance:
            if expand:
                coded_files.expand(model, out, progress=advance)
                printed.line(f"wrote {out}")
                printed.result({"out": str(out)})
                return
            made = coded_files.squeeze(model, out, progress=advance)
        printed.line(f"wrote {out}; {coded_files.describe(made)}")
        printed.result({"out": str(out), **asdict(made)})
