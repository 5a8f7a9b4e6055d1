"""The snippets of docs/guides/serve.md, as a reader would run them."""

import subprocess
import sys

from tests.cli.conftest import CHAT_TEMPLATE
from tests.models import write_tiny_model
from tests.test_readme import snippets

from .test_openai import serving


def test_snippets_run(tmp_path):
    found = snippets("docs/guides/serve.md")
    assert len(found) == 2
    # babel cannot chat, so a tiny model has its name here.
    model = write_tiny_model(tmp_path / "tiny", CHAT_TEMPLATE)
    with serving(model, "--name", "babel") as server:
        for _, code in found:
            code = code.replace("http://127.0.0.1:8000/v1", server.url)
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert done.stdout.strip()
