"""The sections of docs/results.md that set moekit's mixes beside single steps and other tools."""

from typing import Any

from tables import machine, table


def compress_auto(record: dict[str, Any]) -> str:
    found, options = record["metrics"], record["options"]
    rows = []
    for one in found["budgets"]:
        forecast_error = one["forecast"] - one["increase"]
        rows.append(
            [
                f"{one['share']:.0%}",
                one["pick"],
                f"{one['bytes']:,}",
                f"{one['increase']:+.4f}",
                f"{one['forecast']:+.4f} ({forecast_error:+.4f})",
                one["single"] or "none fits",
                "" if one["single_increase"] is None else f"{one['single_increase']:+.4f}",
            ]
        )
    front = [
        [one["label"], f"{one['bytes']:,}", f"{one['increase']:+.4f}", f"{one['forecast']:+.4f}"]
        for one in found["front"]
    ]
    return "\n\n".join(
        [
            "## Which mix for a budget",
            "`benchmarks/compress_auto.py`. `compress auto` on babel for five budgets, shares of "
            f"its {found['unchanged_bytes']:,} bytes in 16 bits: the pick of its search "
            f"({found['probes']} probes on {options['probe']:,} bytes of each domain of `train`; "
            f"{found['combinations']} combinations of its two largest kinds alone), and the best "
            "single step that fits, chosen knowing the result. Increase of bits per byte on "
            f"{options['valid']:,} bytes of each domain of `valid` ("
            f"{found['unchanged_bits_per_byte']:.4f} unchanged); in brackets the forecast's error. "
            + machine(record),
            table(
                ["budget", "pick", "bytes", "increase", "forecast", "best single step", "increase"],
                rows,
            ),
            "The front that the search returned, everything on it measured on `valid`:",
            table(["combination", "bytes", "increase", "forecast"], front),
        ]
    )


def compress_peers(record: dict[str, Any]) -> str:
    found, options = record["metrics"], record["options"]
    peers = sorted((row for row in found["rows"] if row["peer"]), key=lambda row: -row["bytes"])
    own = sorted((row for row in found["rows"] if not row["peer"]), key=lambda row: -row["bytes"])
    beside = []
    for peer in peers:
        fitting = [row for row in own if row["bytes"] <= peer["bytes"]]
        best = min(fitting, key=lambda row: row["bpb"], default=None)
        cells = ["no smaller one", "", "", ""]
        if best is not None:
            gain = peer["bpb"] - best["bpb"]
            cells = [best["name"], f"{best['bytes']:,}", _loss(best), f"{gain:+.4f}"]
        beside.append([peer["name"], f"{peer['bytes']:,}", _loss(peer), *cells])
    return "\n\n".join(
        [
            "## At equal bytes, beside other tools",
            "`benchmarks/compress_peers.py`. babel, all weights but the embedding of the input "
            "(16 bits everywhere): bytes, and bits per byte of "
            f"{found['scored_bytes']:,} bytes of `valid`, in windows of 512 tokens, every token "
            "predicted from the true ones before it. llama.cpp quantised and scored its files "
            "itself (babel's rows of 128 and 256 columns: K-quants fall back to other formats for "
            "`down`). The other rows are mean and range over "
            f"{options['seeds']} calibrations of {options['max_tokens']} tokens, stored packed and "
            "scored by the engine; groups of 128 without zero points are what other tools write "
            "by default, with attention and head here in int8 as in moekit's rows. "
            + machine(record),
            table(
                [
                    *("peer", "bytes", "bits per byte"),
                    *("moekit's best, no larger", "bytes", "bits per byte", "gain"),
                ],
                beside,
            ),
            "All of moekit's rows:",
            table(
                ["moekit", "bytes", "bits per byte"],
                [[row["name"], f"{row['bytes']:,}", _loss(row)] for row in own],
            ),
        ]
    )


def _loss(row: dict[str, Any]) -> str:
    spread = f" ± {row['spread'] / 2:.4f}" if row.get("spread") else ""
    return f"{row['bpb']:.4f}{spread}"
