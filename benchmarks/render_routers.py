"""The section of docs/results.md on routers and balance rules trained beside each other."""

from statistics import mean, stdev
from typing import Any

from claims import claims_table
from router_cases import CLAIMS
from tables import machine, table


def router_table(record: dict[str, Any]) -> str:
    found, options = record["metrics"], record["options"]
    by_name: dict[str, dict[int, dict[str, Any]]] = {}
    for row in found["rows"]:
        by_name.setdefault(row["name"], {})[row["seed"]] = row
    tokens = options["steps"] * options["windows"] * options["length"]
    seeds = sorted({row["seed"] for row in found["rows"]})
    model = found["model"]
    lines = [
        _line(name, runs) for name, runs in sorted(by_name.items(), key=lambda item: _loss(item[1]))
    ]
    losses = {
        name: {seed: run["loss"] for seed, run in runs.items()} for name, runs in by_name.items()
    }

    def remark(worse: str, better: str) -> str:
        said = "" if by_name[better][seeds[0]]["causal"] else ", but not causal"
        work = [by_name[name][seeds[0]].get("experts_a_token") for name in (worse, better)]
        if None not in work and not 0.95 < work[1] / work[0] < 1.05:
            said += f", at {work[1] / work[0]:.1f} times the work"
        return said

    return "\n\n".join(
        [
            "## Routers and balance rules, trained",
            f"`benchmarks/router_table.py`. {model['num_hidden_layers']} layers of width "
            f"{model['hidden_size']}, 16 SwiGLU experts of 48 neurons, two of them for a token, as "
            "many as the dense twin has, unless the name says otherwise; a vocabulary of "
            f"{options['vocab']:,}, {tokens:,} tokens of 15 domains in {options['steps']} steps, "
            f"{len(seeds)} seeds"
            + ("" if found["complete"] else ", as far as the runs have come")
            + "; a seed fixes the windows and their order for all rows. Held-out loss in nats a "
            "token, mean and standard deviation over the seeds; imbalance: largest load over the "
            "mean, over layers and the last 50 steps; work: what the experts of a token compute, "
            "in such experts; time: processor time of a step on one thread of a machine that did "
            "other things, so it only tells large differences. Rows in italics route by later "
            "tokens, so their loss is no likelihood. " + machine(record),
            table(["", "loss", "imbalance", "dead", "work", "parameters", "ms a step"], lines),
            "What papers claim: difference of the loss between the worse and the better side "
            "(standard error), seed by seed. Reproduced or refuted where the mean is beyond two "
            "standard errors of the differences, otherwise within noise, which is what claims of "
            "equality say. A step is one micro-batch, so the balance loss is over all of it unless "
            "it says otherwise. A million tokens and 16 experts are less than any of the papers "
            "use.",
            claims_table(CLAIMS, losses, remark),
        ]
    )


def _loss(runs: dict[int, dict[str, Any]]) -> float:
    return mean(run["loss"] for run in runs.values())


def _line(name: str, runs: dict[int, dict[str, Any]]) -> list[str]:
    rows = list(runs.values())
    losses = [row["loss"] for row in rows]
    spread = f" ± {stdev(losses):.3f}" if len(losses) > 1 else ""

    def average(key: str, form: str) -> str:
        values = [row[key] for row in rows if key in row]
        return format(mean(values), form) if values else ""

    return [
        name if rows[0]["causal"] else f"*{name}*",
        f"{mean(losses):.3f}{spread}",
        average("imbalance", ".2f"),
        average("dead", ".1f"),
        average("experts_a_token", ".2f"),
        average("parameters", ",.0f"),
        average("cpu_ms_per_step", ".0f"),
    ]
