"""Routers that are settings of the pipeline: a row each."""

from __future__ import annotations

import dataclasses
from typing import Any

from moekit.core.registry import Method, Option, register_preset, registry

from .pipeline import pipeline_router

_OPTIONS = {o.name: o for o in registry.find("pipeline", kind="router").options}


def preset(
    name: str, title: str, paper: str, settings: dict[str, Any], options: tuple[str, ...] = ()
) -> Method:
    """Register the pipeline with `settings` as router `name`; `options` stay free."""
    return register_preset(
        pipeline_router,
        name,
        kind="router",
        title=title,
        paper=paper,
        needs=("training",),
        settings=settings,
        options=tuple(_option(option, settings) for option in options),
    )


def _option(name: str, settings: dict[str, Any]) -> Option:
    """The pipeline's option, with what the preset sets as its default."""
    if name not in settings:
        return _OPTIONS[name]
    return dataclasses.replace(_OPTIONS[name], default=settings[name], required=False)


_CAPACITY = ("capacity", "eval_capacity", "order")
_GROUPS = ("groups", "keep_groups", "scale")

preset(
    "switch",
    "Top-k of a softmax, raw weights, jittered input, a capacity",
    "Switch Transformer, arXiv:2101.03961",
    {"weights": "raw", "jitter": 0.01, "capacity": 1.25, "eval_capacity": 2.0},
    ("jitter", *_CAPACITY),
)
preset(
    "gshard",
    "Top-k of a softmax, renormalised, later choices thinned out, a capacity",
    "GShard, arXiv:2006.16668",
    {"weights": "renormalised", "thin_second": True, "capacity": 1.25, "eval_capacity": 2.0},
    ("thin_second", *_CAPACITY),
)
preset(
    "softmax-raw",
    "Top-k of a softmax with its raw probabilities as weights (DeepSeekMoE, OLMoE)",
    "DeepSeekMoE, arXiv:2401.06066",
    {"weights": "raw"},
    ("noise", "scale", *_CAPACITY),
)
preset(
    "softmax-renormalised",
    "Top-k of a softmax, weights renormalised over the chosen (Mixtral, Qwen3-MoE)",
    "Mixtral of Experts, arXiv:2401.04088",
    {"weights": "renormalised"},
    ("noise", "scale", *_CAPACITY),
)
preset(
    "deepseek-v2",
    "Top-k of a softmax inside the best groups of experts, raw weights times a scale",
    "DeepSeek-V2, arXiv:2405.04434",
    {"weights": "raw", "group_score": "max", "scale": 1.0},
    _GROUPS,
)
preset(
    "deepseek-v3",
    "Sigmoid scores and a loss-free bias inside the best groups, renormalised times a scale",
    "DeepSeek-V3, arXiv:2412.19437",
    {
        "weights": "renormalised",
        "squash": "sigmoid",
        "bias_rate": 1e-3,
        "group_score": "top2",
        "scale": 2.5,
    },
    ("bias_rate", "bias_rule", "bias_limit", *_GROUPS),
)
preset(
    "loss-free",
    "Sigmoid scores with a loss-free bias on the choice, renormalised",
    "Loss-free balancing, arXiv:2408.15664",
    {"weights": "renormalised", "squash": "sigmoid", "bias_rate": 1e-3},
    ("bias_rate", "bias_rule", "bias_limit", "scale"),
)
preset(
    "moge",
    "The same number of experts in each group of experts, raw weights",
    "Pangu Pro MoE, arXiv:2505.21411",
    {"weights": "raw", "select": "group-quota"},
    ("groups",),
)
preset(
    "top-p",
    "As many experts as it takes for their probabilities to pass a threshold, raw weights",
    "Harder Tasks Need More Experts, arXiv:2403.07652",
    {"weights": "raw", "select": "top-p"},
    ("threshold",),
)
preset(
    "expert-choice",
    "Experts choose their tokens, the same number each; not causal",
    "Expert Choice, arXiv:2202.09368",
    {"weights": "raw", "select": "expert-choice"},
    ("within", "cap"),
)
