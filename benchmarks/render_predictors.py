"""The section of docs/results.md about predictors of experts, for `render.py`."""

from typing import Any

from tables import machine, table


def predictors(record: dict[str, Any]) -> str:
    found, options = record["metrics"], record["options"]
    budgets = found["quality"]["random"]["ahead"][0]["budgets"]
    rows = []
    for name, one in found["quality"].items():
        ahead = one["ahead"]
        rows.append(
            [
                name,
                *(f"{entry['recall'][0]:.3f}" for entry in ahead),
                *(f"{recall:.3f}" for recall in ahead[0]["recall"][1:]),
                " ".join(f"{wasted:.2f}" for wasted in ahead[0]["wasted"]),
            ]
        )
    played = next(iter(found["in_time"]))["predictors"]
    times = [
        [
            f"{row['share']:.0%}",
            f"{row['read']:g}",
            f"{row['hit_rate']:.3f}",
            f"{row['time']:.3f}",
            *(
                f"{row['predictors'][name]['time']:.3f} ({row['predictors'][name]['bytes']:.2f})"
                for name in played
            ),
        ]
        for row in found["in_time"]
    ]
    wider = [f"{size} of {found['num_experts']}, 1 ahead" for size in budgets[1:]]
    return "\n\n".join(
        [
            "## Predicting experts",
            "`benchmarks/predictors.py`. Recall on babel of the experts that a token uses, one "
            f"sequence at a time: {found['tokens']:,} tokens of `valid` in {found['sequences']} "
            f"documents; learned on {found['learned_tokens']:,} tokens of `train` "
            f"({options['length']} tokens a document). Budget {budgets[0]} = K unless said; "
            f"wasted: experts read in vain for each one used, at {budgets} and nothing cached. "
            + machine(record),
            table(
                ["predictor", "1 ahead", "2 ahead", "3 ahead", *wider, "wasted, 1 ahead"],
                rows,
            ),
            "What prefetch is worth, in virtual time: computing a layer takes 1, reading an expert "
            f"as said, the cache holds a share of the experts (policy {found['policy']}, cold "
            "start counted). Time over max(computing, reading the misses without prefetch), in "
            "brackets bytes over those without prefetch.",
            table(["cached", "a read takes", "hit rate", "no prefetch", *played], times),
        ]
    )
