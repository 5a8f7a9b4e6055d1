"""`moekit compress auto`: a pick within the budget, written as it was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeForCausalLM

from moekit.core.load import load
from moekit.core.plan import ExpertPlan
from moekit.runtime.unpack import load_packed
from tests.models import tiny_config, tiny_tokenizer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight experts a layer, wide enough for groups of 32."""
    path = tmp_path_factory.mktemp("auto") / "model"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tiny_config(hidden_size=64, moe_intermediate_size=32, num_experts=8)
        Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    lines = [json.dumps({"text": f"the router chooses expert {n} of many " * 4}) for n in range(12)]
    (folder / "en.jsonl").write_text("\n".join(lines))
    return folder


def test_the_pick_fits_and_is_written_as_measured(moekit, tiny, text, tmp_path) -> None:
    given = ("--data", text, "--probe-bytes", 400, "--probes", 3, "--json")
    experts = load(tiny).spec
    whole = experts.total_params * 2
    done = moekit("compress", "auto", tiny, tmp_path / "out", "--size", whole * 2 // 3, *given)
    assert done.code == 0, done.err
    numbers = done.json["numbers"]
    pick = numbers["picks"][0]
    assert pick["bytes"] <= whole * 2 // 3
    losses = [row["increase"] for row in numbers["front"]]
    assert losses == sorted(losses, reverse=True)
    assert pick["tokens_per_second"] > 0
    # Sizes are those of the codec; the file holds page-aligned records and a header beside them.
    assert load_packed(tmp_path / "out").spec.num_experts <= experts.num_experts
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["command"] == "compress auto"
    assert record["options"]["method"] == pick["label"]


def test_budgets_without_output_and_a_plan_alone(moekit, tiny, text, tmp_path) -> None:
    whole = load(tiny).spec.total_params * 2
    given = ("--data", text, "--probe-bytes", 200, "--probes", 1, "--json")
    sizes = ("--size", whole, "--size", whole * 3 // 4)
    done = moekit("compress", "auto", tiny, *sizes, *given)
    assert done.code == 0, done.err
    assert [pick["budget"] for pick in done.json["picks"]] == [whole, whole * 3 // 4]
    # Everything fits: nothing is done, or what helps the probe.
    assert done.json["picks"][0]["increase"] <= 0
    plan = tmp_path / "plan.json"
    done = moekit("compress", "auto", tiny, "--size", whole * 3 // 4, "--plan-only", plan, *given)
    assert done.code == 0, done.err
    ExpertPlan.load(plan).validate(load(tiny).spec)


def test_bad_budgets(refused, tiny, text, tmp_path) -> None:
    data = ("--data", text, "--probe-bytes", 200)
    assert "give one of --memory, --size, --speed" in refused("compress", "auto", tiny, *data)
    assert "--data" in refused("compress", "auto", tiny, "--size", "1MB")
    told = refused("compress", "auto", tiny, "--size", 1000, *data)
    assert "less than the smallest combination" in told
    told = refused("compress", "auto", tiny, "--speed", 1e9, *data)
    assert "no step gets beyond" in told
    both = ("--size", "1MB", "--size", "2MB")
    assert "give one --size" in refused("compress", "auto", tiny, tmp_path / "o", *both, *data)
