import json
import os
import subprocess
import sys

import pytest
import torch

from moekit.core.collect import pad_batches
from moekit.core.load import load
from moekit.core.record import RunRecord
from moekit.core.stats import ExpertStats, merge_all
from moekit.core.view import MoEView
from moekit.profile import align_weights, profile
from tests.models import tiny_config, tiny_tokenizer
from tests.profile.common import differences

TEXTS = {"de": "der Router wählt zwei Experten. " * 3, "en": "the router chooses two experts " * 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for domain, text in TEXTS.items():
        (folder / f"{domain}.jsonl").write_text(json.dumps({"text": text}))
    return folder


def test_profile_is_that_of_the_python_call(moekit, tiny, data, tmp_path):
    args = ("--seq-len", 16, "--batch-size", 2, "--json")
    result = moekit("profile", tiny, data, "--out", tmp_path / "s", *args).json
    loaded = load(tiny)
    align_weights(loaded.model)
    sequences = []
    for domain, text in TEXTS.items():
        ids = loaded.tokenizer(text)["input_ids"]
        sequences += [(ids[start : start + 16], domain) for start in range(0, len(ids), 16)]
    expected = profile(MoEView(loaded.model), list(pad_batches(sequences, 2)))
    stats = ExpertStats.open(tmp_path / "s")
    assert differences(expected, stats) == []
    assert stats.domains == result["domains"] == ["de", "en"]
    assert result["tokens"] == sum(len(ids) for ids, _ in sequences)
    for position, row in enumerate(result["layers"]):
        assert row["short"] == int((stats.counts(position) < 32).sum())
    assert len(result["shortfalls"]) == sum(row["short"] for row in result["layers"])
    record = RunRecord.load(tmp_path / "s")
    assert record.options["batch_size"] == 2
    assert {file.name for file in record.artefacts} == {"stats.json", "stats.safetensors"}
    assert {p.name for p in tmp_path.iterdir()} == {"s"}


def test_shuffle_draws_documents_by_seed(moekit, tiny, tmp_path):
    lines = [json.dumps({"text": f"document {n} " * (n + 1)}) for n in range(12)]
    (tmp_path / "en.jsonl").write_text("\n".join(lines))

    def counted(name, *options):
        out = tmp_path / name
        done = moekit("profile", tiny, tmp_path / "en.jsonl", "--out", out, *options)
        assert done.code == 0, done.err
        return ExpertStats.open(out)

    part = ("--max-tokens", 60)
    first, again = (counted(name, *part, "--shuffle", "--seed", 1) for name in "ab")
    assert differences(first, again) == []
    assert differences(first, counted("c", *part, "--shuffle", "--seed", 2)) != []
    assert differences(first, counted("d", *part)) != []


def test_streamed_is_the_same(moekit, tiny, data, tmp_path):
    sets = ("--set", "default", "--set", "full", "--layers", "1", "--batch-size", 4)
    moekit("profile", tiny, data, "--out", tmp_path / "a", *sets)
    more = ("--stream", "--memory", "1GB")
    moekit("profile", tiny, data, "--out", tmp_path / "b", *sets, *more)
    first, second = ExpertStats.open(tmp_path / "a"), ExpertStats.open(tmp_path / "b")
    assert differences(first, second) == []
    assert first.has(1, "input_second")
    assert not first.has(0, "input_second")


def test_earlier_stats_are_added(moekit, tiny, data, tmp_path):
    moekit("profile", tiny, data / "de.jsonl", "-o", tmp_path / "de")
    moekit("profile", tiny, data / "en.jsonl", "-o", tmp_path / "en")
    moekit("profile", tiny, data / "en.jsonl", "-o", tmp_path / "both", "--add", tmp_path / "de")
    merged = merge_all(ExpertStats.open(tmp_path / name) for name in ("de", "en"))
    assert differences(ExpertStats.open(tmp_path / "both"), merged) == []


def test_dry_run_forecasts_and_writes_nothing(moekit, tiny, data, tmp_path):
    args = ("profile", tiny, data, "-o", tmp_path / "s", "--seq-len", 16, "--batch-size", 1)
    forecast = moekit(*args, "--dry-run", "--json").json
    assert not (tmp_path / "s").exists()
    moekit(*args)
    written = sum(v.nbytes for v in ExpertStats.open(tmp_path / "s").held.values())
    # One batch holds one of the two domains.
    assert written / 2 < forecast["bytes"] <= written
    assert forecast["batches"] > 1


def test_experts_that_fell_short_are_named(moekit, tiny, data, tmp_path):
    out = moekit("profile", tiny, data, "-o", tmp_path / "s", "--min-tokens", 1000).out
    assert "layer 0 expert 0: " in out
    assert "the text is short: an expert gets " in out


def test_refusals(refused, tiny, data, tmp_path):
    out = ("-o", tmp_path / "t")
    (tmp_path / "empty.txt").write_text("")
    assert "no text found" in refused("profile", tiny, tmp_path / "empty.txt", *out)
    assert "exists already" in refused("profile", tiny, data, "-o", tmp_path)
    assert "there are default, diagonal" in refused("profile", tiny, data, *out, "--set", "all")
    assert "--stream, which is not given" in refused("profile", tiny, data, *out, "--memory", "1GB")
    assert "give at least" in refused("profile", tiny, data, *out, "--stream", "--memory", "1kB")
    assert "'7' is no MoE layer; there are 0, 1" in refused(
        "profile", tiny, data, *out, "--layers", "7"
    )
    assert "--seq-len 65 exceed" in refused("profile", tiny, data, *out, "--seq-len", 65)
    assert "holds no stats" in refused("profile", tiny, data, *out, "--add", tmp_path)
    assert not (tmp_path / "t").exists()


def test_stats_of_another_model_are_not_added(moekit, refused, tiny, data, tmp_path):
    from transformers import Qwen3MoeForCausalLM

    with torch.random.fork_rng():
        Qwen3MoeForCausalLM(tiny_config(num_experts=8)).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    moekit("profile", tmp_path / "other", data, "-o", tmp_path / "s")
    message = refused("profile", tiny, data, "-o", tmp_path / "t", "--add", tmp_path / "s")
    assert "8 experts, top 2 where the model has layer 0, 4 experts, top 2" in message


def test_two_processes_reduce_exactly(moekit, tiny, data, tmp_path):
    """torchrun gives the merge of the shares bit by bit, and the counts of one process."""
    args = ["--seq-len", "16", "--batch-size", "1", "--set", "default", "--set", "diagonal"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command = [*launch, "2", "-m", "moekit", "profile", tiny, data, "-o", tmp_path / "two", *args]
    done = subprocess.run(
        [str(part) for part in command], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = ExpertStats.open(tmp_path / "two")
    loaded = load(tiny)
    align_weights(loaded.model)
    sequences = []
    for domain, text in TEXTS.items():
        ids = loaded.tokenizer(text)["input_ids"]
        sequences += [(ids[start : start + 16], domain) for start in range(0, len(ids), 16)]
    batches = list(pad_batches(sequences, 1))
    view, sets = MoEView(loaded.model), ("default", "diagonal")
    shares = [profile(view, batches[rank::2], sets=sets) for rank in range(2)]
    assert differences(merge_all(shares), two) == []
    one = profile(view, batches, sets=sets)
    for position in range(len(view)):
        assert torch.equal(one.counts(position), two.counts(position))
        # The same float64 terms in another order.
        torch.testing.assert_close(
            one.get(position, "moments"), two.get(position, "moments"), rtol=1e-12, atol=0
        )
    assert {p.name for p in tmp_path.iterdir()} == {"two"}
