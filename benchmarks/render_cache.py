"""The section of docs/results.md about cache policies, for `render.py`."""

from typing import Any

from tables import machine, table


def cache_policies(record: dict[str, Any]) -> str:
    found = record["metrics"]
    shares = [f"{share:.0%}" for share in found["shares"]]
    places = ("per layer", "shared")
    by_place = [{row["policy"]: row for row in found[place]["policies"]} for place in places]
    order = sorted(by_place[1], key=lambda name: -by_place[1][name]["hit_rate"][1])
    rows = [
        [
            f"**{name}**" if name == "auto" else name,
            *(
                f"{rate:.3f} ({of_best:.2f})"
                for rows in by_place
                for rate, of_best in zip(
                    rows[name]["hit_rate"], rows[name]["of_belady"], strict=True
                )
            ),
        ]
        for name in order
    ]
    return "\n\n".join(
        [
            "## Cache policies",
            f"`benchmarks/cache_policies.py`. Demand hit rate of decoding {found['tokens']:,} "
            "tokens of `valid` with babel, 15 domains in turn, the cold start counted and nothing "
            f"prefetched, with room for {', '.join(shares)} of the experts: "
            f"{found['slots_per_layer']} slots for each layer of 32 experts, or "
            f"{found['slots_shared']} shared by the 6 layers; in brackets the share of Belady's "
            "optimum for the same slots. The half life of auto was chosen on other text. Sets are "
            "learned on `train` or, for the random set, drawn; `knows n` keeps what this token and "
            f"the next n - 1 will use. {machine(record)}",
            table(["policy", *(f"{p}, {share}" for p in places for share in shares)], rows),
        ]
    )
