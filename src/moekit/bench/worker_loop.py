"""One inference program in a process of its own, driven by JSON lines: the side of the process.

Standard library and numpy only, since llama.cpp's process runs in an environment of its own. A
program is any object with the methods of `Program`; `serve` answers `{"op": NAME, ...}` with one
line each.
"""

import json
import sys
import time
import traceback
from typing import Any, Protocol

import numpy as np


class Program(Protocol):
    """What is compared. Token ids are lists; a sequence starts with `prefill` or `logits`. What a
    method `stepped` does after every step is not timed."""

    def prefill(self, ids: list[int]) -> None:
        """Begin a sequence with these tokens, up to the logits of the last."""

    def step(self, token: int) -> None:
        """Append one token, up to its logits [V] in memory."""

    def logits(self, ids: list[int]) -> np.ndarray:
        """[T, V] in float32, of a sequence from its beginning."""


def memory() -> dict[str, int]:
    """Bytes of this process by kind, as Linux counts them now."""
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile", "VmHWM")}


def answer(program: Program, request: dict[str, Any]) -> Any:
    match request["op"]:
        case "prefill":
            started = time.perf_counter()
            program.prefill(request["ids"])
            return time.perf_counter() - started
        case "decode":
            seconds = []
            stepped = getattr(program, "stepped", None)
            for token in request["ids"]:
                started = time.perf_counter()
                program.step(token)
                seconds.append(time.perf_counter() - started)
                if stepped is not None:
                    stepped()
            return seconds
        case "logits":
            np.save(request["path"], program.logits(request["ids"]))
            return request["path"]
        case "memory":
            return memory()
        case "stats":
            return program.stats()  # type: ignore[attr-defined]
        case "fill":
            return program.fill()  # type: ignore[attr-defined]
    raise ValueError(request["op"])


def serve(make: Any) -> None:
    """Make the program, then answer until standard input ends. Errors are answers too."""
    # Whatever libraries print goes to standard error; the answers keep the pipe for themselves.
    pipe = sys.stdout
    sys.stdout = sys.stderr

    def say(content: dict[str, Any]) -> None:
        pipe.write(json.dumps(content) + "\n")
        pipe.flush()

    started = time.perf_counter()
    try:
        program = make()
        say({"value": time.perf_counter() - started})
        for line in sys.stdin:
            say({"value": answer(program, json.loads(line))})
    except Exception:
        say({"error": traceback.format_exc()})
