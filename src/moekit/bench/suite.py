"""The whole suite for one model: in memory beside other programs, then under limits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moekit.bench.budgets import Limit, routing, run_under
from moekit.bench.in_memory import check, run_in_memory
from moekit.bench.programs import Programs
from moekit.core.architecture import read_config
from moekit.core.machine import available_memory
from moekit.runtime.context import context_length
from moekit.runtime.store import ExpertStore

CHECKED, PROMPT, STEPS = 64, 128, 48
# Of the memory that is left, what a model that is compared in memory may take.
SHARE = 0.5


def run_suite(
    programs: Programs,
    ids: Sequence[int],
    *,
    limits: Sequence[Limit],
    rounds: int,
    note: Callable[[str], None],
) -> dict[str, Any]:
    """Check, then measure on the tokens `ids`: in memory, if the model fits several times, and
    under each of the `limits`.

    `failed` names what failed its check; no speed is reported of that.
    """
    fits = _bytes(programs) <= SHARE * available_memory()
    options = () if fits else ("--memory", "auto")
    if not fits:
        note("too large to be compared in memory: limits only")
        others = sorted(set(programs.starts) - {programs.name})
        for name in others:
            del programs.starts[name]
        programs.model = None
    # Prompt and continuation of a round, or what the model's context holds of them.
    room = context_length(read_config(programs.packed), default=PROMPT + STEPS)
    prompt = PROMPT * room // (PROMPT + STEPS)
    note("checking logits")
    checked = check(programs, ids[:CHECKED], *options)
    found: dict[str, Any] = {"check": checked, "left_out": programs.left_out}
    if fits:
        note(f"in memory, {rounds} rounds of {len(programs.starts)} programs")
        found["in_memory"] = run_in_memory(
            programs, checked, ids, prompt=prompt, steps=room - prompt, rounds=rounds
        )
    rows: list[dict[str, Any]] = []
    if limits and checked[programs.name]["ok"]:
        steps, checksum = routing(programs, ids, limits[0])
        for limit in limits:
            note(" ".join(limit.options).removeprefix("--"))
            rows.append(run_under(programs, limit, ids, steps, checksum))
    found["limits"] = rows
    found["failed"] = [name for name, row in checked.items() if not row["ok"]]
    found["failed"] += [f"limit of {row['limit']} bytes" for row in rows if not row["ok"]]
    return found


def _bytes(programs: Programs) -> int:
    """Bytes of the largest form of the model that would be in memory, in 16 bits."""
    if programs.model is not None:
        return sum(file.stat().st_size for file in programs.model.glob("*.safetensors"))
    with ExpertStore.open(programs.packed) as store:
        resident = sum(info.nbytes for info in store.resident_info().values())
        return store.expert_bytes + resident
