"""moekit run with an engine: memory table, packing on the fly, faults, Ctrl-C."""

import re
import signal

import pytest

from moekit.core.pack import pack
from moekit.runtime import pack_cache
from tests.interrupts import INTERRUPTED

from .conftest import start

PROMPT = "der Router"
GREEDY = ("--no-do-sample", "--max-new-tokens", "8")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(pack_cache, "cache_directory", lambda: tmp_path / "cache")


@pytest.fixture(scope="module")
def packed(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "packed"
    pack(tiny, out, codec="fp32")
    return out


def test_same_text_as_without_an_engine(moekit, tiny, packed):
    plain = moekit("run", tiny, PROMPT, *GREEDY).out
    assert moekit("run", packed, PROMPT, *GREEDY).out == plain
    limited = moekit("run", packed, PROMPT, "--memory", "3GB", *GREEDY)
    assert limited.out == plain
    assert moekit("run", tiny, PROMPT, "--memory", "auto", *GREEDY).out == plain


def test_memory_table_adds_up_on_standard_error(moekit, packed):
    done = moekit("run", packed, PROMPT, "--memory", "3GB", "--max-context", "64", *GREEDY)
    rows = re.findall(r"^(\w[\w ]*?)\s{2,}([\d.]+ [kMGT]?B)", done.err, re.MULTILINE)
    names = [name for name, _ in rows]
    assert names[:3] == ["program", "resident part", "KV cache"]
    assert dict(rows)["limit"] == "3.00 GB"
    assert "expert cache" in names
    assert re.search(r"experts: [\d.]+% of \d+ in memory", done.err)


def test_json_holds_the_account(moekit, packed):
    result = moekit("run", packed, PROMPT, "--memory", "3GB", "--json", *GREEDY).json
    memory = result["engine"]["memory"]
    parts = ("program", "resident_part", "kv_cache", "scratch", "overhead", "expert_cache")
    assert sum(memory[name] for name in parts) + memory["not_needed"] == memory["limit"]
    assert result["engine"]["misses"] > 0
    assert result["new_tokens"] == 8


def test_options_of_the_cache(moekit, packed):
    text = moekit("run", packed, PROMPT, "--json", *GREEDY).json["text"]
    for extra in (
        ("--expert-cache", "30kB", "--policy", "lru", "--no-prefetch"),
        ("--expert-cache", "30kB", "--predictor", "next-gate", "--runner", "graph"),
    ):
        result = moekit("run", packed, PROMPT, "--json", *GREEDY, *extra).json
        assert result["text"] == text
        assert result["engine"]["misses"] > 8


def test_dry_run_forecasts_and_loads_nothing(moekit, tiny, packed, monkeypatch):
    monkeypatch.setattr("moekit.open_engine", None)
    for model in (packed, tiny):
        result = moekit("run", model, "--memory", "3GB", "--dry-run", "--json").json
        assert result["dry_run"]
        assert result["memory"]["limit"] == 3 * 10**9
        assert result["tokens_per_second"] > 0
        assert result["hit_rate"] == 1
    done = moekit("run", packed, "--expert-cache", "30kB", "--dry-run")
    assert re.search(r"forecast: [\d.]+ tokens/s", done.out)
    assert "expert cache" in done.out


def test_forecast_stands_beside_the_measurement(moekit, packed):
    done = moekit("run", packed, PROMPT, "--memory", "3GB", *GREEDY)
    assert re.search(r"forecast [\d.]+ tokens/s .*; measured [\d.]+", done.err)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--memory", "20MB"), "at least"),
        (("--memory", "much"), "not an amount"),
        (("--num-beams", "2"), "beam search"),
        (("--policy", "newest"), "newest"),
    ],
)
def test_refusals(refused, packed, options, words):
    assert words in refused("run", packed, PROMPT, *options)


def test_more_than_the_context_is_refused(moekit, packed):
    done = moekit("run", packed, PROMPT, "--max-context", "16", "--max-new-tokens", "30")
    assert (done.code, done.out) == (2, "")
    assert "the context is 16" in done.err.splitlines()[-1]


def test_damage_ends_with_code_2_and_no_wrong_text(moekit, tiny, tmp_path):
    path = tmp_path / "packed"
    pack(tiny, path, codec="fp32")
    whole = moekit("run", path, PROMPT, *GREEDY).out
    (file,) = path.glob("experts*.safetensors")
    content = bytearray(file.read_bytes())
    for page in range(len(content) // 2, len(content), 4096):
        content[page + 100] ^= 1
    file.write_bytes(content)
    done = moekit("run", path, PROMPT, "--no-do-sample", "--max-new-tokens", "40")
    assert done.code == 2
    assert "is damaged: its checksum is" in done.err
    assert whole.startswith(done.out.rstrip())


def test_interrupt_ends_at_once(packed):
    process = start("run", packed, PROMPT, "--memory", "3GB", "--max-new-tokens", "50")
    # The table is written before the first token.
    for line in process.stderr:
        if line.startswith("limit"):
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (0, *INTERRUPTED), err  # 0: it had already ended
    assert "Traceback" not in err


def test_other_verbs_read_a_packed_model(moekit, tiny, packed, tmp_path):
    stored = moekit("inspect", packed, "--json").json["checkpoint"]
    assert stored["layout"] == "packed, fp32"
    assert "packed, fp32 layout" in moekit("inspect", packed).out
    text = tmp_path / "text.txt"
    text.write_text("der Router wählt zwei Experten. " * 4)
    scores = [moekit("eval", model, text, "--json").json for model in (tiny, packed)]
    assert scores[0]["per_domain"] == scores[1]["per_domain"]


def test_dry_run_of_a_server_forecasts_batches(moekit, packed):
    options = ("--dry-run", "--max-streams", 4, "--requests", "20+10x50")
    result = moekit("serve", packed, *options, "--json").json
    server = result["server"]
    assert (server["streams"], result["memory"]["streams"]) == (4, 4)
    assert server["decoding"] > result["tokens_per_second"]
    some, endless = server["some"], server["endless"]
    assert 0 < some["generated_per_second"] <= endless["generated_per_second"]
    done = moekit("serve", packed, *options)
    assert "requests of 20 tokens answered with 10" in done.out
    assert "4 sequences that decode together" in done.out


def test_requests_that_cannot_be_forecast(refused, packed):
    assert "512+128x100" in refused("serve", packed, "--dry-run", "--requests", "many")
