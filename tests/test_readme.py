"""The snippets of the README and of the guides, run in order on babel as a reader would."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    "docs/start.md",
    "docs/concepts.md",
    "docs/extend.md",
    "docs/extend/router.md",
    "docs/guides/compress.md",
    "docs/guides/export-gguf.md",
    "docs/guides/run-larger-than-memory.md",
    "docs/guides/train-a-new-moe.md",
    "docs/guides/routers.md",
    "docs/guides/routers-by-key-and-unit.md",
]
# Their commands take minutes; those of the pages above go through the same verbs.
LONG = [
    "docs/guides/condense.md",
    "docs/guides/profile.md",
    "docs/guides/analyze.md",
    "docs/guides/report.md",
    "docs/guides/quantize.md",
]
FENCE = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#]+)\)")


def snippets(page):
    return FENCE.findall((ROOT / page).read_text(encoding="utf-8"))


def run(language, code, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if language == "python":
        command = [sys.executable, "-c", code]
    else:
        words = shlex.split(code)
        assert words[0] == "moekit"
        command = [sys.executable, "-m", *words]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize(
    "page", [*PAGES, *(pytest.param(page, marks=pytest.mark.slow) for page in LONG)]
)
def test_snippets_run(page, tmp_path):
    shutil.copy(ROOT / "README.md", tmp_path)
    found = snippets(page)
    assert found
    for language, code in found:
        for part in [code] if language == "python" else code.strip().splitlines():
            done = run(language, part, tmp_path)
            assert done.returncode == 0, f"{part}\n{done.stderr}"
            assert done.stdout.strip() or language == "python"


@pytest.mark.parametrize("page", [*PAGES, *LONG, "docs/index.md"])
def test_links_lead_somewhere(page):
    for target in LINK.findall((ROOT / page).read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target


def test_make_is_what_ci_calls():
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert "make test " in (ROOT / "README.md").read_text()
