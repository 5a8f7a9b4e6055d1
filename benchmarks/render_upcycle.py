"""The section of docs/results.md on growing a MoE beside training it from scratch."""

from statistics import mean, stdev
from typing import Any

from claims import claims_table
from tables import machine, table

CLAIMS = (
    (
        "An upcycled MoE beats going on with the dense model",
        "Sparse Upcycling 2212.05055",
        "dense, continued",
        "sparse upcycling, 4",
    ),
    (
        "An upcycled MoE beats one trained from scratch",
        "Sparse Upcycling 2212.05055",
        "MoE of 4 from scratch",
        "sparse upcycling, 4",
    ),
    (
        "Drawing half of the neurons anew beats plain copies",
        "Drop-Upcycling 2502.19261",
        "sparse upcycling, 4",
        "drop upcycling, 4",
    ),
    (
        "Experts from domains beat copies of one model",
        "Branch-Train-MiX 2403.07816",
        "sparse upcycling, 4",
        "Branch-Train-MiX, 4",
    ),
    (
        "Attention experts too beat FFN experts",
        "BAM 2408.08274",
        "Branch-Train-MiX, 4",
        "BAM, 5",
    ),
    (
        "Experts duplicated half-way match all of them from the beginning",
        "Expert Upcycling 2604.19835",
        "MoE of 8 from scratch",
        "expert upcycling, 4 to 8",
    ),
    (
        "An ensemble of domain experts beats the dense model of equal compute",
        "Branch-Train-Merge 2208.03306",
        "dense, continued",
        "Branch-Train-Merge",
    ),
)


def upcycle_table(record: dict[str, Any]) -> str:
    found, options = record["metrics"], record["options"]
    by_name: dict[str, dict[int, dict[str, Any]]] = {}
    for row in found["rows"]:
        by_name.setdefault(row["name"], {})[row["seed"]] = row
    lines = []
    for name, runs in sorted(by_name.items(), key=lambda i: mean(r["loss"] for r in i[1].values())):
        losses = [run["loss"] for run in runs.values()]
        spread = f" ± {stdev(losses):.3f}" if len(losses) > 1 else ""
        first = next(iter(runs.values()))
        cells = [f"{first['dense_steps']:,.0f}", f"{first['parameters']:,}"]
        lines.append([name, f"{mean(losses):.3f}{spread}", *cells])
    losses = {
        name: {seed: run["loss"] for seed, run in runs.items()} for name, runs in by_name.items()
    }
    return "\n\n".join(
        [
            "## Growing a MoE, beside training one from scratch",
            "`benchmarks/upcycle_table.py`. A dense model of "
            f"{found['model']['num_hidden_layers']} layers of width "
            f"{found['model']['hidden_size']} after {options['base']} steps of "
            f"{options['tokens']:,} tokens, four fine-tunes of it on groups of domains "
            f"({options['branch']} steps each), and what became of them when all had used the "
            f"multiplications of {options['budget']} dense steps (untrained rows: what is said). "
            "Held-out loss over all domains in nats a token, mean and standard deviation over "
            f"{len({row['seed'] for row in found['rows']})} seeds"
            + ("" if found["complete"] else ", as far as the runs have come")
            + ". The ensemble runs four to five models for a token. "
            + machine(record),
            table(["", "loss", "dense steps", "parameters"], lines),
            "What papers claim, seed by seed; reproduced or refuted where the mean is beyond two "
            "standard errors:",
            claims_table(CLAIMS, losses),
        ]
    )


def upcycle_peers(record: dict[str, Any]) -> str:
    """Joining fine-tunes beside mergekit-moe."""
    found = record["metrics"]
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in found["rows"]:
        cells.setdefault((row["mode"], row["tool"]), []).append(row)
    lines = []
    for mode in dict.fromkeys(row["mode"] for row in found["rows"]):
        line = [mode]
        for tool in ("mergekit", "moekit"):
            runs = cells[mode, tool]
            losses = [run["loss"] for run in runs]
            line += [
                f"{mean(losses):.3f} ± {stdev(losses):.3f}",
                f"{mean(run['own_expert_first'] for run in runs):.1%}",
            ]
        lines.append(line)
    return "\n\n".join(
        [
            "## Fine-tunes joined beside mergekit-moe",
            "`benchmarks/upcycle_peers.py`. The dense model and the four fine-tunes of the table "
            "before, joined by mergekit-moe 0.1.5 and by moekit from the same recipe with "
            f"{record['options']['prompts']} prompts an expert, nothing trained. All weights but "
            "the routers' are equal bit for bit. Held-out loss in nats a token (mean and standard "
            "deviation over the seeds), and the share of held-out tokens whose first expert is "
            f"that of their group of domains ({1 / found['groups']:.0%} by chance). "
            + machine(record),
            table(
                ["gate_mode", "mergekit loss", "own first", "moekit loss", "own first"],
                lines,
            ),
        ]
    )
