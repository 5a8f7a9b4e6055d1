"""Bytes: parsing and printing them, what this process uses, what a model needs at a bit width.

A model enters as its number of parameters per part (`PARTS`), so nothing here knows families.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from moekit.core.errors import UserError

# Order of the rows in tables. "other" holds norms and whatever else is small and never quantised.
PARTS = ("embedding", "attention", "dense_mlp", "router", "shared", "routed", "other")
# Parts that stay at 16 bits when the rest is quantised: tiny, and a wrong choice of expert is
# worse than a slightly wrong expert.
SENSITIVE_PARTS = frozenset({"router", "other"})
BIT_WIDTHS = (32, 16, 8, 4)
MEMORY_SIZES = (8, 12, 16, 24, 32, 48, 64, 80, 96, 128, 192, 256, 512, 1024)
# Below 16 bits each group of this many weights carries one 16-bit scale.
SCALE_GROUP = 32

_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def bytes_of(text: str | int) -> int:
    """Parse an amount of memory: "14GB" is 14e9 bytes, "14GiB" is 14 * 2**30, "512" is bytes.

    Raises `UserError` for anything else, naming the accepted forms.
    """
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    if match is None or (match[3] and not match[2]):
        raise UserError(
            f"{text!r} is not an amount of memory; write it like 14GB (14e9 bytes), "
            "14GiB (14 * 2**30), 512MB or a plain number of bytes."
        )
    unit = match[2].lower()
    return int(float(match[1]) * (_BINARY[unit] if match[3] else _DECIMAL[unit]))


def format_bytes(count: int | float) -> str:
    """Decimal units with three digits: 14.0 GB, 512 MB, 640 B."""
    value, units = float(count), ["TB", "GB", "MB", "kB", "B"]
    while abs(value) >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop()
    unit = units[-1]
    if unit == "B" or abs(value) >= 99.95:
        return f"{value:.0f} {unit}"
    return f"{value:.1f} {unit}" if abs(value) >= 9.995 else f"{value:.2f} {unit}"


def rss_anon(pid: int | str = "self") -> int:
    """Anonymous resident bytes of a process: its heap and tensors, without file-backed pages.

    Linux only (`/proc/<pid>/status`); raises `UserError` elsewhere.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError as error:
        raise UserError(f"anonymous memory of process {pid} needs Linux's /proc: {error}") from None
    # A process that is ending has no memory fields any more.
    match = re.search(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


class PeakMemory:
    """Context that samples `rss_anon` of this process; `start`, `peak`, `above_start` in bytes."""

    def __init__(self, interval: float = 0.01) -> None:
        self.interval = interval
        self.start = self.peak = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def above_start(self) -> int:
        return self.peak - self.start

    def _sample(self) -> None:
        while not self._stop.wait(self.interval):
            self.peak = max(self.peak, rss_anon())

    def __enter__(self) -> PeakMemory:
        self.start = self.peak = rss_anon()
        self._stop.clear()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self.peak = max(self.peak, rss_anon())


def bits_per_weight(bits: float) -> float:
    """Bits stored per weight including group scales: 4 becomes 4.5 and 8 becomes 8.5."""
    return bits if bits >= 16 else bits + 16 / SCALE_GROUP


def part_bytes(part: str, params: int, bits: float, router_bits: float = 16) -> int:
    """Bytes of one part at `bits`; routers and norms never go below `router_bits`."""
    if part in SENSITIVE_PARTS:
        bits = max(bits, router_bits)
    return round(params * bits_per_weight(bits) / 8)


def model_bytes(parts: Mapping[str, int], bits: float, router_bits: float = 16) -> int:
    """Bytes of a whole model given its parameters per part."""
    return sum(part_bytes(part, count, bits, router_bits) for part, count in parts.items())


def memory_table(
    parts: Mapping[str, int], bit_widths: Sequence[int] = BIT_WIDTHS
) -> dict[str, dict[int, int]]:
    """Bytes per part and bit width, with a "total" row; parts without parameters are left out."""
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise ValueError(f"unknown parts {unknown}; known: {list(PARTS)}")
    table = {
        part: {bits: part_bytes(part, parts[part], bits) for bits in bit_widths}
        for part in PARTS
        if parts.get(part)
    }
    table["total"] = {bits: sum(row[bits] for row in table.values()) for bits in bit_widths}
    return table


@dataclass(frozen=True)
class Fit:
    """What a memory of `memory` bytes holds of a model at `bits`.

    `whole`: the model fits. Otherwise `resident` says whether all but the routed experts fits, and
    `expert_fraction` (0 to 1) how many of the routed experts fit beside it.
    """

    memory: int
    bits: int
    whole: bool
    resident: bool
    expert_fraction: float


def fits(
    parts: Mapping[str, int],
    memory: int,
    bit_widths: Sequence[int] = BIT_WIDTHS,
    reserve: float = 0.1,
) -> list[Fit]:
    """What fits into `memory` bytes at each bit width, keeping the share `reserve` for activations,
    the key-value cache and the program itself."""
    budget = memory * (1 - reserve)
    found = []
    for bits in bit_widths:
        routed = part_bytes("routed", parts.get("routed", 0), bits)
        resident = model_bytes(parts, bits) - routed
        room = budget - resident
        fraction = 0.0 if room < 0 else 1.0 if routed <= room else room / routed
        found.append(Fit(memory, bits, fraction == 1.0, room >= 0, fraction))
    return found


def fit_table(
    parts: Mapping[str, int],
    sizes: Sequence[int] = MEMORY_SIZES,
    bit_widths: Sequence[int] = BIT_WIDTHS,
) -> dict[int, list[Fit]]:
    """`fits` for memories of `sizes` decimal gigabytes, keyed by gigabytes, up to the first size
    that holds the whole model at every width."""
    table = {}
    for size in sizes:
        table[size] = fits(parts, size * 10**9, bit_widths)
        if all(fit.whole for fit in table[size]):
            break
    return table
