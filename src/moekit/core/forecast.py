"""What a machine has and what a job will take, said before anything expensive starts."""

from __future__ import annotations

import os
import platform
import re
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Hardware:
    """Processor, `cores` this process may use, `memory` in bytes, GPU names and the system."""

    cpu: str
    cores: int
    memory: int
    gpus: tuple[str, ...]
    system: str

    @classmethod
    def read(cls) -> Hardware:
        """This machine. GPUs are listed only when torch is loaded: importing it takes seconds."""
        return cls(
            _cpu_model(),
            len(os.sched_getaffinity(0)),
            os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
            _gpus(),
            f"{platform.system()} {platform.release()} {platform.machine()}",
        )

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "gpus": list(self.gpus)}


@dataclass(frozen=True)
class Forecast:
    """`bytes` that a job will write and `seconds` it will take; `details` are counts behind them.

    `basis` says where the seconds come from, such as a part that was run.
    """

    bytes: int
    seconds: float
    basis: str
    details: dict[str, int] = field(default_factory=dict)

    @classmethod
    def from_part(
        cls, seconds: float, nbytes: float, fraction: float, details: dict[str, int], part: str
    ) -> Forecast:
        """Scale what `fraction` (0 to 1] of the job took and wrote to the whole of it."""
        scaled = round(seconds / fraction, 1)
        return cls(round(nbytes / fraction), scaled, f"measured on {part}", details)

    def rows(self) -> list[tuple[str, str]]:
        """Lines of a table for people."""
        counts = [(name.replace("_", " "), f"{value:,}") for name, value in self.details.items()]
        return [*counts, ("bytes", f"{self.bytes:,}"), ("seconds", f"{self.seconds:,.1f}")]

    def to_dict(self) -> dict[str, Any]:
        values = {"bytes": self.bytes, "seconds": self.seconds, "basis": self.basis}
        return {"dry_run": True, **self.details, **values}


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.processor()


def _gpus() -> tuple[str, ...]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return ()
    return tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
