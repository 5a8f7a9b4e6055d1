"""Inference programs in processes of their own: the side of whoever measures.

Each program loads once and waits; a benchmark then lets them take turns, so that all of them see
the same minutes of the same machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

HERE = Path(__file__).parent


class WorkerError(RuntimeError):
    """The program failed or was killed; the message says how."""


class Worker:
    """A running program. `opening` is how many seconds it took to be ready.

    `python` and `script`, beside this file or anywhere, with `arguments` start it; `wrap` is put
    before the command, such as what moves the process into a cgroup. After `patience` seconds it is
    killed.
    """

    def __init__(
        self,
        script: str,
        *arguments: str,
        python: str = sys.executable,
        wrap: tuple[str, ...] = (),
        patience: float | None = None,
    ) -> None:
        self._process = subprocess.Popen(
            [*wrap, python, str(HERE / script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._watch = None if patience is None else threading.Timer(patience, self._process.kill)
        if self._watch is not None:
            self._watch.daemon = True
            self._watch.start()
        self.opening: float = self._read()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        assert self._process.stdin is not None
        if self._process.poll() is None:
            self._process.stdin.close()
        if self._watch is not None:
            self._watch.cancel()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def call(self, op: str, **arguments: Any) -> Any:
        """The answer to one request; raises `WorkerError` where there is none."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self._ended()) from None
        return self._read()

    def logits(self, ids: list[int]) -> np.ndarray:
        """[T, V] in float32."""
        with tempfile.TemporaryDirectory() as folder:
            return np.load(self.call("logits", ids=ids, path=str(Path(folder) / "logits.npy")))

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(self._ended())
        answer = json.loads(line)
        if "error" in answer:
            # The process ends by itself, and is waited for so that nothing of it stays.
            self.close()
            raise WorkerError(answer["error"])
        return answer["value"]

    def _ended(self) -> str:
        code = self._process.wait()
        return f"killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
