"""What papers claim of one method beside another, decided from paired seeds."""

from collections.abc import Callable, Iterable
from statistics import mean, stdev

from tables import table

# What is said, by whom, and the (worse, better) rows that show it.
Claim = tuple[str, str, str, str]


def claims_table(
    claims: Iterable[Claim],
    losses: dict[str, dict[int, float]],
    remark: Callable[[str, str], str] = lambda worse, better: "",
) -> str:
    """The verdicts; `losses` are by row and seed, `remark` says what a comparison suffers from."""
    lines = []
    for text, paper, worse, better in claims:
        both = sorted(losses.get(worse, {}).keys() & losses.get(better, {}).keys())
        gains = [losses[worse][seed] - losses[better][seed] for seed in both]
        if not gains:
            continue
        said = verdict(gains) + remark(worse, better)
        error = f" ({_error(gains):.4f})" if len(gains) > 1 else ""
        by_seed = ", ".join(f"{gain:+.4f}" for gain in gains)
        lines.append([f"{text} ({paper})", f"**{said}**", f"{mean(gains):+.4f}{error}", by_seed])
    return table(["claim", "verdict", "mean difference", "by seed"], lines)


def verdict(gains: list[float]) -> str:
    """Of what the better side gains, seed by seed."""
    if len(gains) < 2:
        return "one seed only"
    if abs(mean(gains)) <= 2 * _error(gains):
        return "within noise"
    return "reproduced" if mean(gains) > 0 else "refuted"


def _error(gains: list[float]) -> float:
    return stdev(gains) / len(gains) ** 0.5
