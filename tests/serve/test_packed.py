"""A packed model larger than its memory behind the server."""

import os
import urllib.request

import openai
import pytest

from moekit.core.pack import pack
from tests.models import write_tiny_model

from .test_openai import PROMPT, serving

MEMORY = ("--memory", "3GB", "--expert-cache", "30kB", "--max-streams", "4")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("packed") / "tiny")


@pytest.fixture(scope="module")
def packed(tiny):
    pack(tiny, tiny.with_name("packed"), codec="fp32")
    return tiny.with_name("packed")


def texts(client: openai.OpenAI, name: str) -> list[str]:
    done = client.completions.create(
        model=name, prompt=[PROMPT, "zwei", PROMPT], n=2, max_tokens=20, seed=7
    )
    return [choice.text for choice in done.choices]


def test_same_texts_as_the_whole_model(tiny, packed):
    with serving(tiny) as whole:
        wanted = texts(whole.client, "tiny")
    with serving(packed, *MEMORY) as server:
        assert texts(server.client, "packed") == wanted
        memory = server.memory
        parts = ("program", "resident_part", "kv_cache", "scratch", "overhead", "expert_cache")
        assert sum(memory[part] for part in parts) + memory["not_needed"] == memory["limit"]
        assert memory["expert_cache"] <= 30_000
        page = urllib.request.urlopen(server.url.replace("/v1", "/metrics")).read().decode()
        counts = dict(line.split() for line in page.splitlines() if line.count(" ") == 1)
        assert int(counts["moekit_expert_misses_total"]) > 0
        assert int(counts["moekit_expert_read_bytes_total"]) > 0
        assert 0 < float(counts["moekit_expert_hit_rate"]) < 1
        assert int(counts["moekit_peak_memory_bytes"]) < 3e9


def test_scheduling_changes_no_text(tiny, packed):
    """Who runs first, and sharing that leaves every expert to choose from."""
    with serving(packed, *MEMORY) as server:
        wanted = texts(server.client, "packed")
    options = ("--alike-first", "--share-experts", "des-vote:share=1.0")
    with serving(packed, *MEMORY, *options) as server:
        assert texts(server.client, "packed") == wanted


def test_a_read_error_ends_its_requests_and_not_the_server(packed):
    with serving(packed, *MEMORY) as server:
        wanted = texts(server.client, "packed")
        file = packed / "experts.safetensors"
        content = file.read_bytes()
        os.truncate(file, len(content) // 2)
        try:
            for _ in range(2):
                with pytest.raises(openai.InternalServerError, match=r"experts\.safetensors"):
                    texts(server.client, "packed")
            stream = server.client.completions.create(model="packed", prompt=PROMPT, stream=True)
            with pytest.raises(openai.APIError, match=r"experts\.safetensors"):
                list(stream)
        finally:
            file.write_bytes(content)
        assert texts(server.client, "packed") == wanted
