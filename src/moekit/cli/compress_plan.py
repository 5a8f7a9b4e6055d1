"""`moekit compress plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moekit.cli.common import JsonOption, ModelArgument, NoSeedOption, check_out, output


def plan(
    model: ModelArgument,
    plans: Annotated[
        list[Path],
        typer.Argument(
            metavar="PLAN...",
            help="Plans (JSON files or their directories); each is for what the one before leaves.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write the plan that equals all of them in turn."),
    ] = None,
    seed: NoSeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Check, show and join plans.

    Refuses, before any work, what could not be applied to MODEL: experts that it does not have,
    fewer than its router chooses, a plan for another model.
    """
    with output(as_json) as printed:
        if out is not None:
            check_out(out)
        from moekit.core.load import find_config
        from moekit.core.plan import ExpertPlan, Fingerprint
        from moekit.core.spec import spec_from_config

        spec = spec_from_config(find_config(model))
        joined = ExpertPlan(model=Fingerprint.of(spec))
        for path in plans:
            joined = joined.then(ExpertPlan.load(path))
        joined.validate(spec)
        printed.line(joined.table())
        if out is not None:
            joined.save(out)
            printed.line(f"wrote {out}")
        left = joined.result()
        assert left is not None
        counts = dict(zip(left.layers, left.num_experts, strict=True))
        printed.result(
            {
                "model_type": spec.model_type,
                "uses": joined.uses(),
                "experts": {str(layer): count for layer, count in counts.items()},
                "routers": {str(layer): kind for layer, kind in joined.routers.items()},
                "fit": joined.fit.method if joined.fit else None,
                "out": str(out) if out else None,
            }
        )
