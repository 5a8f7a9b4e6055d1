"""Claims of papers about large models, checked on babel: each with the rule that decides it.

A claim is "reproduced" or "refuted" by the rule beside it, which was fixed before the numbers were
seen unless the rule says otherwise, and "not testable" where babel lacks what the claim is about.
"""

from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np

from moekit.analyze import Result, open_traces
from moekit.analyze.information import p_value, spearman
from moekit.analyze.layer_prediction import layer_prediction
from moekit.analyze.next_gate import next_gate
from moekit.analyze.paired import clustered_mean
from moekit.analyze.segment_cache import sch
from moekit.analyze.super_experts import super_experts
from moekit.analyze.token_identity import token_identity
from moekit.analyze.training_phases import LEAST_SHARE, training_phases
from moekit.core.seeds import derive_seed
from moekit.core.trace import RoutingTrace
from moekit.core.view import MoEView

REPRODUCED, REFUTED, NOT_TESTABLE = "reproduced", "refuted", "not testable at this size"
PERMUTATIONS = 1000
RATIOS = "1,1.25,1.5,1.75,2,2.5,3,4,5,6,8"

Claims = dict[str, dict[str, Any]]


def claim(paper: str, text: str, rule: str, verdict: str, **numbers: Any) -> dict[str, Any]:
    return {"paper": paper, "claim": text, "rule": rule, "verdict": verdict, "numbers": numbers}


def rows_of(result: Result) -> list[dict[str, Any]]:
    """The table of a measure as a list of dicts."""
    return [dict(zip(result.columns, row, strict=True)) for row in result.rows]


def language_separation(found: dict[str, dict[str, Any]]) -> Claims:
    """Two claims about parallel sentences, from `parallel_divergence`."""
    depth = {
        group: np.array([row["divergence"] for row in found.values() if row["trained"] or not only])
        for group, only in (("trained", True), ("all", False))
    }
    third = depth["all"].shape[1] // 3
    ends = {}
    for group, values in depth.items():
        middle = values[:, third:-third].mean(1)
        ones = np.ones(len(values))
        early = clustered_mean(values[:, :third].mean(1) - middle, ones)
        late = clustered_mean(values[:, -third:].mean(1) - middle, ones)
        ends[group] = (early, late)
    early, late = ends["trained"]
    u_shaped = early.low > 0 and late.low > 0
    against = early.high < 0 or late.high < 0
    middle = depth["all"][:, third:-third].mean(1)
    bits = np.array([row["extra_bits"] for row in found.values()])
    correlation = spearman(middle, bits)
    random = np.random.default_rng(derive_seed(0, "babel-analysis"))
    null = [spearman(middle, random.permutation(bits)) for _ in range(PERMUTATIONS)]
    p = float(p_value(abs(correlation), np.abs(np.array(null))))
    significant = p <= 0.05
    return {
        "language-u": claim(
            "Multilingual Routing 2510.04694",
            "Routing of parallel sentences is language-specific in early and late layers and "
            "shared in the middle (a U over depth).",
            "reproduced: over the five trained languages both the first and the last third of the "
            "layers lie above the middle third (95 % intervals above 0); refuted: one of them "
            "below",
            REPRODUCED if u_shaped else REFUTED if against else NOT_TESTABLE,
            early_minus_middle=[early.mean, early.low, early.high],
            late_minus_middle=[late.mean, late.low, late.high],
            by_layer_trained=depth["trained"].mean(0).tolist(),
            by_layer_all=depth["all"].mean(0).tolist(),
            all_early_minus_middle=[ends["all"][0].mean, ends["all"][0].low, ends["all"][0].high],
            all_late_minus_middle=[ends["all"][1].mean, ends["all"][1].low, ends["all"][1].high],
            all_significant=all(row["largest_p"] <= 0.05 for row in found.values()),
        ),
        "language-loss": claim(
            "Multilingual Routing 2510.04694",
            "The farther a language routes from English in the middle layers, the worse the model "
            "is at it (here: extra bits a sentence over its English side).",
            "rank correlation over all languages, p by exchange: reproduced if positive with p <= "
            "0.05, refuted if negative with p <= 0.05",
            (REPRODUCED if correlation > 0 else REFUTED) if significant else NOT_TESTABLE,
            correlation=correlation,
            p=p,
            languages=len(found),
        ),
    }


def token_dependence(trace: RoutingTrace) -> Claims:
    result = token_identity(trace)
    found = result.summary
    mostly = found["token"] >= 0.5 and found["token"] > found["position"]
    return {
        "token-identity": claim(
            "OpenMoE 2402.01739",
            "Routing depends mostly on the token id and little on context or position.",
            "reproduced: two occurrences of a token share half or more of their experts beyond "
            "chance, and more than equal positions do; else refuted",
            REPRODUCED if mostly else REFUTED,
            **{
                name: found[name]
                for name in ("token", "pair", "position", "shuffled", "early", "late")
            },
            by_layer=result.column("token"),
        )
    }


def knee(ratios: list[float], rates: list[float]) -> float:
    """The ratio where a concave curve is farthest above the line between its ends."""
    x, y = np.array(ratios), np.array(rates)
    line = y[0] + (y[-1] - y[0]) * (x - x[0]) / (x[-1] - x[0])
    return float(x[int(np.argmax(y - line))])


def cache_size(trace: RoutingTrace) -> Claims:
    best = sch(trace, windows="16", ratios=RATIOS)
    ratios = best.column("ratio")
    knees = {name: knee(ratios, best.column(name)) for name in ("m=16", "lru", "belady")}
    at_two = ratios.index(2)
    return {
        "cache-knee": claim(
            "Not All Models Suit Expert Offloading 2505.16056",
            "The hit rate of the segment cache has its knee at about twice the active experts.",
            "reproduced: the point farthest above the line from 1 to 8 times the active experts "
            "(all of babel's) lies between 1.5 and 2.5 for a lookahead of 16 tokens; else refuted",
            REPRODUCED if 1.5 <= knees["m=16"] <= 2.5 else REFUTED,
            knees=knees,
            ratios=ratios,
            sch=best.column("m=16"),
            lru=best.column("lru"),
            belady=best.column("belady"),
            at_twice={
                "sch": best.column("m=16")[at_two],
                "lru": best.column("lru")[at_two],
                "belady": best.column("belady")[at_two],
                "uniform": best.column("slots")[at_two] / trace.layers[0].num_experts,
            },
        )
    }


def predictability(trace: RoutingTrace, view: MoEView) -> Claims:
    gate = next_gate(trace, view, widen=4)
    table = layer_prediction(trace)
    recall, wide = gate.column("+0"), gate.column("+4")
    mean, base = float(np.mean(recall)), float(np.mean(table.column("popular")))
    depth = np.arange(len(recall))
    deep = spearman(depth, np.array(recall))
    orders = [spearman(depth, np.array(order)) for order in permutations(recall)]
    p = float(np.mean(np.array(orders) >= deep - 1e-9))
    return {
        "next-layer": claim(
            "Fate 2502.12224",
            "The next layer's own router, given this layer's input, predicts most of its experts "
            "(78.8 % in the paper; 97 % with some more prefetched).",
            "reproduced: mean recall of the K experts at least 0.7; refuted: below 0.5, or not "
            "above what the most used experts give; else not testable",
            REPRODUCED if mean >= 0.7 else REFUTED if mean < 0.5 or mean <= base else NOT_TESTABLE,
            recall=mean,
            recall_with_4_more=float(np.mean(wide)),
            popular=base,
            by_layer=recall,
            table_of_transitions=table.summary["recall"],
        ),
        "next-layer-first": claim(
            "Fate 2502.12224",
            "That prediction is worst in the first layers.",
            "reproduced: the first pair of layers is the worst; else refuted",
            REPRODUCED if recall[0] == min(recall) else REFUTED,
            by_layer=recall,
        ),
        "next-layer-depth": claim(
            "Fate 2502.12224",
            "That prediction grows with depth.",
            "rank correlation with depth over all orders of the pairs of layers: reproduced if "
            "positive with p <= 0.05, else not testable (split off the claim before after a first "
            "look, which had called both reproduced)",
            REPRODUCED if p <= 0.05 else NOT_TESTABLE,
            rank_correlation=deep,
            p=p,
            pairs=len(recall),
        ),
    }


def phases(probes: Path) -> Claims:
    traces = open_traces([probes])
    found = training_phases(traces)
    summary = found.summary
    if summary["three_phases"]:
        verdict = REPRODUCED
    elif summary["surge"] or summary["noise"] > LEAST_SHARE * summary["peak"]:
        verdict = NOT_TESTABLE
    else:
        verdict = REFUTED
    return {
        "three-phases": claim(
            "Three Phases of Expert Routing 2604.04230",
            "Over training the congestion coefficient surges, stays and relaxes.",
            "reproduced: rise and fall beyond noise and 15 % of the peak; not testable: a rise "
            "without a fall (the paper's comes after a third of 1.2M steps), or noise above 15 % "
            "of the peak (the latter was added after a first look at the probes); else refuted",
            verdict,
            **summary,
            steps=traces[-1].header.metadata["step"],
            probes=len(traces),
            logits=all(trace.header.logits for trace in traces),
            course=rows_of(found),
        )
    }


def super_presence(trace: RoutingTrace, view: MoEView) -> Claims:
    found = super_experts(trace, view)
    summary = found.summary
    if summary["super_experts"]:
        verdict = REPRODUCED
    else:
        massive = summary["largest_token_over_median"] >= 10
        verdict = REFUTED if massive else NOT_TESTABLE
    return {
        "super-experts": claim(
            "Super Experts 2507.23279",
            "A handful of experts make the model's massive activations.",
            "reproduced: an expert passes the paper's rule and the absolute guards; refuted: "
            "massive activations (a token 10 times the median) without such an expert; not "
            "testable: none",
            verdict,
            **summary,
            layers=found.detail["layers"],
            largest=rows_of(found)[:5],
        )
    }
