"""`moekit bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekit.cli.common import (
    JsonOption,
    NoSeedOption,
    Output,
    ThreadsOption,
    note,
    output,
    set_up,
)
from moekit.core.errors import UserError
from moekit.core.memory import bytes_of, format_bytes

if TYPE_CHECKING:
    from moekit.bench.budgets import Limit
    from moekit.bench.programs import Programs

PARTS = (0.9, 0.6, 0.35)


def bench(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A local directory, a hub id, or babel (default)."),
    ] = "babel",
    memory: Annotated[
        list[str] | None,
        typer.Option(
            metavar="BYTES",
            help="A limit of the process's memory to decode under, as 6GiB; may be repeated. By "
            "default three, with 90, 60 and 35 % of the experts in memory.",
        ),
    ] = None,
    codec: Annotated[
        str, typer.Option(help="How moekit packs the experts (moekit list --kind codec).")
    ] = "int4",
    rounds: Annotated[
        int, typer.Option(min=1, help="Turns of each program; medians are reported.")
    ] = 3,
    tokens: Annotated[
        int, typer.Option(min=8, help="Tokens of text that are decoded under each limit.")
    ] = 128,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Text to use in place of a short sample.")
    ] = None,
    peer_python: Annotated[
        str | None,
        typer.Option(
            metavar="PYTHON", help="A Python with llama-cpp-python; by default this one, if it has."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="File for all numbers, as JSON; must not exist."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Forecast decoding under the limits, and stop."),
    ] = False,
    threads: ThreadsOption = None,
    seed: NoSeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Measure a model's speed on this machine.

    In memory beside transformers and, where llama-cpp-python is, llama.cpp; under memory limits
    beside the forecast, hits beside Belady's optimum. Every program's logits are compared before it
    is timed: one that computes something else gets no speed, and the exit code is 1. Run it on an
    idle machine.
    """
    with output(as_json) as printed:
        if out is not None and out.exists():
            raise UserError(f"--out {out} exists already: choose another path or remove it")
        set_up(seed, threads)
        import torch

        from moekit.bench.programs import find_programs
        from moekit.core.load import find_model

        directory = find_model(model)
        if dry_run:
            _forecast(directory, codec, memory, threads or torch.get_num_threads(), printed)
            return
        programs = find_programs(
            directory,
            codec,
            threads=threads or torch.get_num_threads(),
            peer_python=peer_python,
            note=note,
        )
        _measure(programs, memory, rounds, _ids(directory, file, tokens), out, printed)


def _measure(
    programs: Programs,
    memory: list[str] | None,
    rounds: int,
    ids: list[int],
    out: Path | None,
    printed: Output,
) -> None:
    from moekit.bench.suite import run_suite
    from moekit.core.record import start_record
    from moekit.runtime.store import ExpertStore

    with ExpertStore.open(programs.packed) as store:
        limits = _limits(memory, store.expert_bytes)
    options = {
        "model": str(programs.model or programs.packed),
        "codec": programs.codec,
        "limits": [" ".join(limit.options) for limit in limits],
        "rounds": rounds,
        "tokens": len(ids),
        "threads": programs.threads,
    }
    record = start_record("bench", options, seed=0)
    found = run_suite(programs, ids, limits=limits, rounds=rounds, note=note)
    if out is not None:
        out.write_text(record.finish(found).to_json(), encoding="utf-8")
    _print(printed, found)
    printed.result(found)
    if found["failed"]:
        note(f"failed: {', '.join(found['failed'])}")
        raise typer.Exit(1)


def _forecast(
    directory: Path, codec: str, memory: list[str] | None, threads: int, printed: Output
) -> None:
    from moekit.core.load import PACKED_FILE
    from moekit.runtime.forecast_decode import plan_decode

    own = None if (directory / PACKED_FILE).is_file() else codec
    whole = plan_decode(directory, codec=own, threads=threads).budget.all_experts
    rows = []
    for limit in _limits(memory, whole):
        plan = plan_decode(
            directory,
            limit.memory,
            expert_cache=limit.expert_cache,
            codec=own,
            threads=threads,
        )
        rows.append({"limit": plan.budget.limit, **plan.to_dict()})
    printed.table(
        [[format_bytes(r["limit"]), f"{r['tokens_per_second']:.1f}", r["bound"]] for r in rows],
        header=["memory", "forecast tokens/s", "bound by"],
    )
    printed.result({"dry_run": True, "limits": rows})


def _limits(memory: list[str] | None, all_experts: int) -> list[Limit]:
    """The limits asked for, or those that hold some parts of the experts; the largest first."""
    from moekit.bench.budgets import Limit

    if memory:
        asked = sorted((bytes_of(text) for text in memory), reverse=True)
        return [Limit(memory=limit) for limit in asked]
    return [Limit(expert_cache=int(part * all_experts)) for part in PARTS]


def _ids(directory: Path, file: Path | None, tokens: int) -> list[int]:
    """Token ids of the text, or random ones for a model without tokenizer."""
    import torch

    from moekit.bench.sample_text import TEXT
    from moekit.core.architecture import read_config
    from moekit.core.load import load_tokenizer
    from moekit.runtime.context import context_length

    tokenizer = load_tokenizer(directory)
    if tokenizer is None:
        size = read_config(directory).get_text_config(decoder=True).vocab_size
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, size, (tokens,), generator=generator).tolist()
    text = TEXT if file is None else file.read_text(encoding="utf-8")
    ids: list[int] = tokenizer(text)["input_ids"]
    if not ids:
        raise UserError(f"--file {file} has no text")
    room = context_length(read_config(directory), default=tokens + 1) - 1
    return (ids * -(-tokens // len(ids)))[: min(tokens, room)]


def _print(printed: Output, found: dict[str, Any]) -> None:
    from moekit.bench.turns import DECODE, PREFILL

    timed = found.get("in_memory", {})
    rows = []
    for name, row in found["check"].items():
        speed = timed.get("programs", {}).get(name)
        numbers = ["-", "-"] if speed is None else [f"{speed[DECODE]:.2f}", f"{speed[PREFILL]:.0f}"]
        verdict = "ok" if row["ok"] else f"FAILED: {row['distance']:.3g} of {row['limit']:.3g}"
        rows.append([name, *numbers, f"{row['top_1']:.1%}", verdict])
    printed.table(rows, header=["in memory", "ms a token", "prefill tokens/s", "top-1", "logits"])
    for name, ratio in timed.get("ratios", {}).items():
        printed.line(f"{name}: decode {ratio['decode']:.2f}, prefill {ratio['prefill']:.2f}")
    for line in found["left_out"]:
        printed.line(f"left out: {line}")
    rows = [
        [
            format_bytes(row["limit"]),
            f"{row['expert_share']:.0%}",
            f"{row['tokens_per_second']:.1f}" if row["ok"] else "FAILED",
            f"{row['forecast']:.1f}",
            f"{row['hit_rate']:.1%}",
            f"{row['belady']:.1%}",
            format_bytes(row["bytes_read"]),
            format_bytes(row["peak_bytes"]),
        ]
        for row in found["limits"]
    ]
    if rows:
        printed.line()
    header = ["limit", "experts", "tokens/s", "forecast", "hits", "Belady", "read", "peak"]
    printed.table(rows, header=header)
