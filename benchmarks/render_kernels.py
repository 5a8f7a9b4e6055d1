"""The section of docs/results.md about the native kernels, for `render.py`."""

from typing import Any

from tables import machine, table


def native_kernels(record: dict[str, Any]) -> str:
    rows = []
    for name, row in record["metrics"]["rows"].items():
        shape, codec, *isa = name.split(", ")
        share = f"{row['share_of_read']:.0%}" if "share_of_read" in row else ""
        rows.append(
            [
                f"{shape}, {codec}",
                isa[0] if isa else "",
                f"{row['decode_us']:.0f}",
                f"{row['decode_gb_per_s']:.1f}",
                share,
                f"{row['prefill_ms']:.1f}",
                f"{row['prefill_gflop_per_s']:.0f}",
            ]
        )
    options = record["options"]
    how = f"on {options['threads']} threads"
    if options["busy"]:
        how = "on one thread, in its processor time, since the machine was busy"
    header = ["shape, codec", "instructions", "decode us", "GB/s", "of reading", "prefill ms"]
    return "\n\n".join(
        [
            "## Native kernels",
            "`benchmarks/native_kernels.py`. Experts of the reference shapes R1 (D 1024, F 512) "
            f"and R2 (D 2048, F 768) {how}, their products checked first. Decode: one token "
            "through 8 experts, from more memory than the last-level cache holds; beside it the "
            "share of the speed at which the same memory was merely read. Prefill: 128 tokens "
            "with 8 experts each. " + machine(record),
            table([*header, "GFLOP/s"], rows),
        ]
    )
