"""docs/results.md says what the result files say."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_page_is_current() -> None:
    command = [sys.executable, ROOT / "benchmarks" / "render.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
