"""The processes that benchmarks compare: answers, errors, ends."""

import os

import numpy as np
import pytest

from moekit.bench import workers
from moekit.bench.workers import Worker, WorkerError

PROGRAM = f"""
import os, sys
sys.path.insert(0, {str(workers.HERE)!r})
import numpy as np
from worker_loop import serve

class Program:
    def __init__(self):
        self.seen = []
        if "broken" in sys.argv:
            raise RuntimeError("no model")
    def prefill(self, ids):
        print("noise on standard output")
        self.seen = list(ids)
    def step(self, token):
        self.seen.append(token)
        if token < 0:
            os.abort()
    def logits(self, ids):
        return np.array([ids], np.float32)
    def stats(self):
        return {{"seen": self.seen}}

serve(Program)
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    return str(tmp_path / "program.py")


def test_answers(script):
    with Worker(script) as worker:
        assert worker.opening >= 0
        assert worker.call("prefill", ids=[3, 4]) >= 0
        assert len(worker.call("decode", ids=[5, 6])) == 2
        assert worker.call("stats") == {"seen": [3, 4, 5, 6]}
        assert worker.call("memory")["RssAnon"] > 0
        assert np.array_equal(worker.logits([1, 2]), [[1, 2]])


def test_errors_and_ends(script):
    with pytest.raises(WorkerError, match="no model"):
        Worker(script, "broken")
    with Worker(script) as worker, pytest.raises(WorkerError, match="nonsense"):
        worker.call("nonsense")
    with Worker(script) as worker, pytest.raises(WorkerError, match="killed by signal 6"):
        worker.call("decode", ids=[-1])
    with pytest.raises(WorkerError, match="killed by signal 9"):
        Worker(script, patience=0)


def test_wrap(script):
    inside = ("env", "WRAPPED=1")
    with Worker(script, wrap=inside) as worker:
        assert worker.call("stats") == {"seen": []}
    assert "WRAPPED" not in os.environ
