"""`moekit compress`: the verbs that make a plan for a model's experts and apply it."""

from __future__ import annotations

import typer

from moekit.cli.lazy import LazyGroup

# verb -> (module:function, line for `moekit compress --help`).
VERBS = {
    "prune": ("moekit.cli.compress_prune:prune", "Remove the experts that matter least."),
    "factorize": (
        "moekit.cli.compress_factorize:factorize",
        "Replace experts by products of smaller matrices.",
    ),
    "condense": ("moekit.cli.compress_condense:condense", "Merge experts that do alike."),
    "auto": ("moekit.cli.compress_auto:auto", "Find the least harmful mix of steps for a budget."),
    "quantize": (
        "moekit.cli.compress_quantize:quantize",
        "Store the experts in fewer bits a weight.",
    ),
    "slim": ("moekit.cli.compress_slim:slim", "Make every expert narrower, with training."),
    "compressed-experts": (
        "moekit.cli.compress_experts:compressed_experts",
        "Run fewer experts a token, modulated by vectors.",
    ),
    "library": (
        "moekit.cli.compress_library:library",
        "Write down which experts each of several tasks needs.",
    ),
    "code": (
        "moekit.cli.compress_code:code",
        "Write ternary experts below one bit a weight.",
    ),
    "task-vector": (
        "moekit.cli.compress_task_vector:task_vector",
        "Write a fine-tune as signs over its base (ComPEFT).",
    ),
    "plan": ("moekit.cli.compress_plan:plan", "Check, show and join plans."),
}


class CompressGroup(LazyGroup):
    """The verbs of `moekit compress`."""

    table = VERBS


app = typer.Typer(
    name="compress",
    cls=CompressGroup,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


@app.callback()
def compress() -> None:
    """Make a model smaller, by a plan for its experts.

    Every verb makes a plan from statistics of the model (moekit profile, or --data here), and
    writes the model that the plan leaves. --plan-only stops at the plan, a JSON file to read, edit
    and apply with moekit convert --plan.
    """
