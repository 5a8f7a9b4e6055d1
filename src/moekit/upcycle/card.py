"""The README.md beside an upcycled model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moekit.core.memory import format_bytes

if TYPE_CHECKING:
    from moekit.upcycle.converter import Made
    from moekit.upcycle.run import Request, Upcycled


def card(request: Request, made: Made, result: Upcycled) -> str:
    """What was made of what and how, and what it computes before training."""
    models = [f"- {name}" for name in dict.fromkeys((request.base, *request.others))]
    options = [f"- {name}: {value}" for name, value in request.options.items()]
    lines = [
        "---",
        "tags: [moe, moekit]",
        "---",
        f"# {made.config.model_type} made by {request.method}",
        "",
        f"Made by moekit ({format_bytes(result.bytes)} of weights) from",
        "",
        *models,
        "",
        *(["With", "", *options, ""] if options else []),
        "## Step 0",
        "",
        made.start.text,
    ]
    if result.measured is not None:
        lines.append(
            f"Measured on random tokens in float32: logits differ by at most {result.measured:.3g} "
            "of the largest."
        )
    lines += ["", *(f"- {note}" for note in result.notes)]
    return "\n".join(lines).rstrip() + "\n"
