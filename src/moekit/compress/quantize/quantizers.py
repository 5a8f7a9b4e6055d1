"""The methods of quantization by name: settings of the one rewrite that rounds experts."""

from __future__ import annotations

from pathlib import Path

from moekit.compress.quantize.autoround import STEPS
from moekit.compress.quantize.rounding import (
    AUTOROUND,
    GPTQ,
    MIN_TOKENS,
    NEAREST,
    POOLED,
    RoundedExperts,
    RoundingOptions,
)
from moekit.core.plan import ExpertPlan
from moekit.core.registry import Option, register_preset
from moekit.core.stats import ExpertStats
from moekit.ops.gptq import BLOCK, DAMP


def quantizer(
    plan: ExpertPlan,
    stats: ExpertStats | None,
    *,
    model: Path | None = None,
    codec: str = "int4",
    group_size: int = 32,
    solver: str = NEAREST,
    reach: float = 0.0,
    damp: float = DAMP,
    act_order: bool = True,
    block: int = BLOCK,
    min_tokens: int = MIN_TOKENS,
    fallback: str = POOLED,
    steps: int = STEPS,
) -> RoundedExperts:
    """The rewrite that gives the experts of `plan` their rounded values.

    `codec` and `group_size` hold an expert without bits of its own; the bits of the plan are of the
    same kind. `solver` "gptq" needs `stats` with the set "full"; an expert with fewer than
    `min_tokens` tokens falls back to the inputs of all experts ("pooled", its down projection is
    rounded to nearest) or to rounding ("nearest"). `reach` is the largest share by which a range is
    shrunk. `damp`, `act_order`, `block` are those of `ops.gptq.gptq`. "autoround" needs the set
    "inputs", and `model`, the directory of the model, for its config. Raises `UserError`.
    """
    options = RoundingOptions(
        codec, group_size, solver, reach, damp, act_order, block, min_tokens, fallback, steps
    )
    return RoundedExperts(plan, stats, options, model)


_OPTIONS = (
    Option("codec", "str", "how the experts are encoded (`moekit list --kind codec`)", "int4"),
    Option("group_size", "int", "columns that share a scale: 32, 64 or 128", 32),
    Option("reach", "float", "largest share by which the range of a group is shrunk", 0.0),
)
_GPTQ_OPTIONS = (
    Option("damp", "float", "share of the mean diagonal that is added to the Hessian", DAMP),
    Option("act_order", "bool", "columns of the largest inputs first", True),
    Option("block", "int", "columns that are changed at once", BLOCK),
    Option("min_tokens", "int", "tokens below which an expert falls back", MIN_TOKENS),
    Option("fallback", "str", "for such experts: pooled or nearest", POOLED),
)
_SOLVER = Option("solver", "str", "nearest or gptq", NEAREST)
_STEPS = Option("steps", "int", "steps of learning", STEPS)

for _name, _title, _paper, _needs, _own, _settings in (
    ("rtn", "Round to nearest", "", ("weights",), (), {}),
    (
        "gptq",
        "Column by column, each error made good by the columns still to come",
        "GPTQ 2210.17323, QMoE 2310.16795",
        ("weights", "data"),
        _GPTQ_OPTIONS,
        {"solver": GPTQ},
    ),
    (
        "autoround",
        "Offsets of rounding and ranges learned by the signs of gradients",
        "AutoRound 2309.05516",
        ("weights", "data", "gradients"),
        (_STEPS, _GPTQ_OPTIONS[3]),
        {"solver": AUTOROUND},
    ),
    (
        "awq",
        "Channels scaled by a search over the block's output, then rounded",
        "AWQ 2306.00978",
        ("weights", "data"),
        (_SOLVER, *_GPTQ_OPTIONS),
        {},
    ),
    (
        "eaquant",
        "One smoothing scale for all experts and the router, then rounded",
        "EAQuant 2506.13329",
        ("weights", "data"),
        (_SOLVER, *_GPTQ_OPTIONS),
        {},
    ),
):
    register_preset(
        quantizer,
        _name,
        kind="quantizer",
        title=_title,
        paper=_paper,
        needs=_needs,
        limits="Rounds weights only, not the rotations and activations of the paper."
        if _name == "eaquant"
        else "",
        options=(*_OPTIONS, *_own),
        settings=_settings,
    )
