"""Orderings that papers on merging and factorising experts claim, judged on babel.

A claim says that one row of `compress_condense.py` beats another. The rule, fixed beforehand: over
the seeds the difference in bits per byte is taken pair by pair; "reproduced" where at every ratio
its mean favours the claim by more than its standard deviation, "refuted" where at every ratio it is
against it by more than that, else "cannot be seen at this size".
"""

from statistics import mean, stdev
from typing import Any

Rows = dict[tuple[str, str, float], dict[int, float]]

# paper, claim, (kind, method) that should be better, the other.
CLAIMS: list[tuple[str, str, tuple[str, str], tuple[str, str]]] = [
    (
        "HC-SMoE 2410.08589",
        "Grouping by outputs merges better than by router logits (M-SMoE).",
        ("merge", "hc-smoe"),
        ("merge", "m-smoe"),
    ),
    (
        "HC-SMoE 2410.08589",
        "Merging beats pruning by frequency.",
        ("merge", "hc-smoe"),
        ("prune", "frequency"),
    ),
    (
        "HC-SMoE 2410.08589",
        "Average linkage beats single linkage.",
        ("merge", "hc-smoe"),
        ("merge", "hc-smoe, single linkage"),
    ),
    (
        "HC-SMoE 2410.08589",
        "Average linkage beats complete linkage.",
        ("merge", "hc-smoe"),
        ("merge", "hc-smoe, complete linkage"),
    ),
    (
        "REAP 2510.13999",
        "Pruning by REAP beats merging (HC-SMoE).",
        ("prune", "reap"),
        ("merge", "hc-smoe"),
    ),
    (
        "REAP 2510.13999",
        "Pruning by REAP beats merging (M-SMoE).",
        ("prune", "reap"),
        ("merge", "m-smoe"),
    ),
    (
        "M-SMoE 2310.01334",
        "Aligning neurons before merging helps.",
        ("merge", "m-smoe"),
        ("merge", "m-smoe, not aligned"),
    ),
    (
        "M-SMoE 2310.01334",
        "Groups by router logits beat random groups.",
        ("merge", "m-smoe"),
        ("merge", "random-merge"),
    ),
    (
        "DERN 2509.10377",
        "Handing neurons over beats dropping them with their experts.",
        ("merge", "dern"),
        ("prune", "dern"),
    ),
    (
        "DERN 2509.10377",
        "Recombined neurons beat merging (M-SMoE).",
        ("merge", "dern"),
        ("merge", "m-smoe"),
    ),
    (
        "UNCURL 2409.01483",
        "Clustering and merging beats pruning by frequency.",
        ("merge", "uncurl"),
        ("prune", "frequency"),
    ),
    (
        "Sub-MoE 2506.23266",
        "Merging in the shared subspace beats plain merging (HC-SMoE).",
        ("merge", "sub-moe"),
        ("merge", "hc-smoe"),
    ),
    (
        "REAM 2604.04356",
        "Merging into REAP's survivors beats dropping the others.",
        ("merge", "reap-merge"),
        ("prune", "reap"),
    ),
    (
        "Fisher merging 2111.09832",
        "Weighting by Fisher information beats averages of the same groups.",
        ("merge", "fisher-merge"),
        ("merge", "hc-smoe"),
    ),
    (
        "ZipIt 2305.03053",
        "Merging neurons within experts too beats permuting and averaging.",
        ("merge", "zip-merge"),
        ("merge", "hc-smoe, aligned"),
    ),
    (
        "PLeaS 2407.02447",
        "Refitting by least squares beats permuting and averaging.",
        ("merge", "pleas"),
        ("merge", "hc-smoe, aligned"),
    ),
    (
        "Mixture of Latent Experts 2503.23100",
        "A projection shared by 8 experts beats private factors of the same bytes.",
        ("factorize", "molae"),
        ("factorize", "svd"),
    ),
    (
        "SVD-LLM 2403.07378",
        "Factors in the norm of the outputs beat those of the weights.",
        ("factorize", "svd-white"),
        ("factorize", "svd"),
    ),
]


def rows_by_case(rows: list[dict[str, Any]]) -> Rows:
    """(kind, method, ratio) -> seed -> bits per byte, of what was measured."""
    found: Rows = {}
    for row in rows:
        if row["bpb"] is not None:
            key = (row["kind"], row["method"], row["ratio"])
            found.setdefault(key, {})[row["seed"]] = row["bpb"]
    return found


def difference(rows: Rows, better: tuple[str, str], worse: tuple[str, str], ratio: float) -> Any:
    """(mean, standard deviation) of worse minus better over common seeds, None without any.

    A row without a seed of its own (one seed only) stands beside every seed of the other.
    """
    first, second = rows.get((*better, ratio), {}), rows.get((*worse, ratio), {})
    if not first or not second:
        return None
    seeds = sorted(set(first) | set(second))
    pairs = [
        second.get(seed, next(iter(second.values()))) - first.get(seed, next(iter(first.values())))
        for seed in seeds
        if (seed in first or len(first) == 1) and (seed in second or len(second) == 1)
    ]
    return (mean(pairs), stdev(pairs) if len(pairs) > 1 else 0.0) if pairs else None


def judge(rows: Rows) -> list[dict[str, Any]]:
    """Every claim with its differences by ratio and its verdict."""
    ratios = sorted({ratio for _, _, ratio in rows})
    judged = []
    for paper, claim, better, worse in CLAIMS:
        found = {ratio: difference(rows, better, worse, ratio) for ratio in ratios}
        found = {ratio: pair for ratio, pair in found.items() if pair is not None}
        if not found:
            continue
        if all(centre > spread for centre, spread in found.values()):
            verdict = "reproduced"
        elif all(-centre > spread for centre, spread in found.values()):
            verdict = "refuted"
        else:
            verdict = "cannot be seen at this size"
        judged.append({"paper": paper, "claim": claim, "verdict": verdict, "differences": found})
    return judged
