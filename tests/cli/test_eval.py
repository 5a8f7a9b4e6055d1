import json
import math

import pytest

from moekit.core.load import load
from moekit.evaluate.bits_per_byte import bits_per_byte
from moekit.evaluate.text import read_texts


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    german = [{"text": "der Router wählt zwei Experten. " * 4}, {"text": "kurz"}]
    (folder / "tech-de.valid.jsonl").write_text("\n".join(map(json.dumps, german)))
    (folder / "plain.txt").write_text("the router chooses two experts\n")
    return folder


def test_json_is_the_python_api(moekit, tiny, data):
    args = ("eval", tiny, data, "--context", 32, "--stride", 8, "--json")
    result = moekit(*args).json
    loaded = load(tiny)
    expected = bits_per_byte(loaded.model, loaded.tokenizer, read_texts(data), context=32, stride=8)
    assert result["per_domain"] == expected.to_dict()["per_domain"]
    assert result["mean_bpb"] == expected.mean
    assert list(result["per_domain"]) == ["plain", "tech-de"]
    loss = result["total"]
    assert loss["bpb"] == pytest.approx(loss["nats"] / math.log(2) / loss["bytes"])
    again = moekit(*args).json
    assert {**again, "seconds": 0} == {**result, "seconds": 0}


def test_table(moekit, tiny, data):
    done = moekit("eval", tiny, data / "plain.txt", data / "tech-de.valid.jsonl")
    lines = done.out.splitlines()
    assert lines[0].split() == ["domain", "bytes", "tokens", "bits/byte", "perplexity"]
    assert [line.split()[0] for line in lines[1:3]] == ["plain", "tech-de"]
    assert lines[-1].startswith("mean over 2 domains: ")


def test_default_context_is_at_most_the_models(moekit, tiny, data):
    result = moekit("eval", tiny, data, "--json").json
    assert (result["context"], result["stride"]) == (64, 32)


def test_max_bytes_is_a_domain_limit(moekit, tiny, data):
    result = moekit("eval", tiny, data, "--max-bytes", 10, "--json").json
    assert [loss["bytes"] for loss in result["per_domain"].values()] == [10, 10]


def test_dry_run_counts(moekit, tiny, data):
    plan = moekit("eval", tiny, data, "--dry-run", "--json").json
    total = moekit("eval", tiny, data, "--json").json["total"]
    assert (plan["documents"], plan["text_bytes"], plan["tokens"]) == (
        3,
        total["bytes"],
        total["tokens"],
    )


def test_refusals(refused, tiny, data, tmp_path):
    assert "either DATA" in refused("eval", tiny)
    assert "either DATA" in refused("eval", tiny, data, "--tasks", "x")
    assert "--dry-run forecasts DATA" in refused("eval", tiny, "--tasks", "x", "--dry-run")
    assert "no such file" in refused("eval", tiny, tmp_path / "nowhere.jsonl")
    assert "no text found" in refused("eval", tiny, tmp_path)
    assert "context 65 is longer" in refused("eval", tiny, data, "--context", 65)
    assert "stride 9" in refused("eval", tiny, data, "--context", 8, "--stride", 9)
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text"\n')
    assert "bad.jsonl:2: not valid JSON" in refused("eval", tiny, tmp_path / "bad.jsonl")


TASK = """
task: colours
dataset_path: json
dataset_kwargs:
  data_files: {test: FILE}
test_split: test
output_type: multiple_choice
doc_to_text: "the router chooses"
doc_to_choice: ["two", "zwei"]
doc_to_target: answer
metric_list:
  - metric: acc
"""


@pytest.fixture
def task(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="moekit[eval] is not installed; `make test-all` does")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(json.dumps({"answer": answer}) for answer in (0, 1, 1, 1)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "colours.yaml").write_text(TASK.replace("FILE", str(file)))
    return tmp_path / "tasks"


def test_a_local_task_works_offline(moekit, tiny, task):
    done = moekit("eval", tiny, "--tasks", "colours", "--include-path", task, "--json")
    assert done.code == 0, done.err
    # Every question is the same, so the answer is too: right in one or in three of four.
    assert done.json["tasks"]["colours"]["acc,none"] in (0.25, 0.75)


def test_an_unknown_task_is_refused(refused, tiny, task):
    message = refused("eval", tiny, "--tasks", "colors", "--include-path", task)
    assert "colors" in message.splitlines()[-1]


def test_tasks_without_the_extra(refused, tiny, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    assert "pip install 'moekit[eval]'" in refused("eval", tiny, "--tasks", "x")
