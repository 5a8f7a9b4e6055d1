from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from moekit.cli.main import entry
from tests.models import write_tiny_model

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@dataclass
class Done:
    """What one call of the command line left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out)


@pytest.fixture
def moekit(capsys):
    """Run the command line in this process: `moekit("run", path, "prompt")`."""

    def call(*args: object) -> Done:
        capsys.readouterr()
        try:
            entry([str(arg) for arg in args])
            code = 0
        except SystemExit as exit_:
            code = exit_.code or 0
        done = capsys.readouterr()
        return Done(code, done.out, done.err)

    return call


@pytest.fixture
def refused(moekit):
    """Run the command line and expect a refusal; returns its message."""

    def call(*args: object) -> str:
        done = moekit(*args)
        assert done.code == 2, done
        assert done.out == ""
        assert done.err.startswith("error: ")
        assert len(done.err.splitlines()) <= 2, done.err
        return done.err

    return call


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("cli") / "tiny")


@pytest.fixture(scope="session")
def tiny_chat(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("cli") / "chat", CHAT_TEMPLATE)


def start(*args: object, **options: Any) -> subprocess.Popen[str]:
    """Start the command line as a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "moekit", *map(str, args)],
        **{
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "text": True,
            "env": environment,
            **options,
        },
    )
