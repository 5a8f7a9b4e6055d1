"""What an engine takes, part by part, and what a memory limit leaves for the expert cache."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moekit.core.errors import UserError
from moekit.core.memory import format_bytes
from moekit.core.packed import PAGE

# Of what the system calls available, the share that is taken where nobody names a limit.
AVAILABLE_SHARE = 0.9
# The program takes more than when it was measured: threads, the tokenizer, what torch sets up at
# its first products. Page tables and the allocator's gaps grow with the rest.
PROGRAM_GROWTH = 48 * 2**20
OVERHEAD_SHARE = 0.005


@dataclass(frozen=True)
class Needs:
    """Bytes of an engine but for its experts.

    `program` was measured in this process; `kv_cache` is for `streams` sequences of `max_context`
    tokens; `scratch` is what one step works in.
    """

    program: int
    resident: int
    kv_cache: int
    scratch: int
    streams: int
    max_context: int

    @property
    def total(self) -> int:
        return self.program + self.resident + self.kv_cache + self.scratch


@dataclass(frozen=True)
class Budget:
    """The parts that add up to `limit` bytes; `expert_cache` holds part of `all_experts`.

    `unused` is left over where all experts fit. `of` is the option that sets the limit, "memory" or
    "gpu_memory".
    """

    limit: int
    needs: Needs
    expert_cache: int
    all_experts: int
    overhead: int
    of: str = "memory"

    @property
    def unused(self) -> int:
        return self.limit - self.needs.total - self.expert_cache - self.overhead

    @property
    def complete(self) -> bool:
        """Whether all experts fit."""
        return self.expert_cache >= self.all_experts

    def rows(self) -> list[tuple[str, int, str]]:
        """Name, bytes and explanation of each part; the bytes add up to the last row."""
        needs = self.needs
        streams = f"{needs.streams} streams" if needs.streams > 1 else "1 stream"
        share = min(1.0, self.expert_cache / max(1, self.all_experts))
        program = ("program", needs.program, "Python, torch and libraries, measured now")
        if self.of == "gpu_memory":
            program = ("GPU context", needs.program, "set aside for the driver and kernels")
        rows = [
            program,
            ("resident part", needs.resident, "attention, embeddings, routers, shared experts"),
            ("KV cache", needs.kv_cache, f"{streams} of {needs.max_context} tokens"),
            ("scratch", needs.scratch, "what a step works in"),
            ("overhead", self.overhead, "page tables and the allocator's gaps"),
            (
                "expert cache",
                self.expert_cache,
                f"{share:.0%} of {format_bytes(self.all_experts)} of experts",
            ),
        ]
        if self.unused:
            rows.append(("not needed", self.unused, ""))
        return [*rows, ("limit", self.limit, "")]

    def to_dict(self) -> dict[str, Any]:
        """The rows as plain values, for JSON."""
        return {
            **{name.replace(" ", "_").lower(): count for name, count, _ in self.rows()},
            "all_experts": self.all_experts,
            "streams": self.needs.streams,
            "max_context": self.needs.max_context,
        }


def plan_budget(
    limit: int | None,
    needs: Needs,
    sizes: NDArray[np.int64],
    top_k: int,
    available: int,
    expert_cache: int | None = None,
    of: str = "memory",
) -> Budget:
    """Share out `limit` bytes; `sizes` [L, E] are the bytes of the experts' records.

    The expert cache gets what is left, at most `expert_cache`. Without a limit it is as large as
    all experts, or as a share of the `available` bytes leaves where they do not fit. Raises
    UserError with all numbers where a layer's `top_k` experts do not fit.
    """
    everything = int(sizes.sum())
    wanted = everything if expert_cache is None else min(everything, expert_cache)
    if limit is None:
        limit = _with_overhead(needs.total + wanted)
        if expert_cache is None:
            limit = min(limit, max(needs.program, int(available * AVAILABLE_SHARE)))
    overhead = round(limit * OVERHEAD_SHARE)
    room = limit - needs.total - overhead
    made = Budget(limit, needs, min(wanted, room // PAGE * PAGE), everything, overhead, of)
    least = top_k * int(sizes.max())
    if made.expert_cache < least:
        raise UserError(_refusal(made, least, top_k))
    return made


def leaves_on_disk(
    limit: int | None,
    beside: int,
    sizes: NDArray[np.int64],
    available: int,
    expert_cache: int | None = None,
) -> bool:
    """Whether experts will stay on disk where `beside` bytes are wanted for all else; what is
    `plan_budget` to know exactly is estimated before anything is read."""
    experts = int(sizes.sum())
    if expert_cache is not None and expert_cache < experts:
        return True
    return beside + experts > (available * AVAILABLE_SHARE if limit is None else limit)


def _with_overhead(nbytes: int) -> int:
    """The limit whose overhead leaves at least `nbytes`."""
    return math.ceil((nbytes + PAGE) / (1 - OVERHEAD_SHARE))


def _refusal(budget: Budget, least: int, top_k: int) -> str:
    needs = budget.needs
    smallest = _with_overhead(needs.total + least)
    parts = [(name, count) for name, count, _ in budget.rows()[:5]]
    counted = ", ".join(f"{name} {format_bytes(count)}" for name, count in parts)
    return (
        f"{budget.of} {format_bytes(budget.limit)} is too little: {counted}, and a layer's {top_k} "
        f"experts {format_bytes(least)}.\nGive at least {format_bytes(smallest + 5e6)}, or less "
        f"max_context ({needs.max_context}) or fewer streams ({needs.streams}), or pack with "
        "fewer bits"
    )
