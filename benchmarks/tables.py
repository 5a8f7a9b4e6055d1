"""What the sections of docs/results.md share."""

from typing import Any


def table(header: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def machine(record: dict[str, Any]) -> str:
    hardware, versions = record["hardware"], record["versions"]
    return (
        f"{hardware['cpu']}, {hardware['cores']} cores; torch {versions['torch']}, transformers "
        f"{versions['transformers']}; {record['started'][:10]}."
    )
