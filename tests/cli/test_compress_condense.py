"""`moekit compress condense`: what it writes, and what it refuses before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moekit.core.plan import ExpertPlan
from tests.models import TEXT


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text(TEXT * 4, encoding="utf-8")
    return path


def logits(path: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=torch.arange(10)[None]).logits


def test_writes_a_model_that_stock_transformers_loads(
    moekit: Any, tiny: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = moekit(
        "compress", "condense", tiny, out, "--experts", 2, "--data", text, "--eval", text,
        "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    # Half the size was asked for, so no copies for an alias table.
    assert "averaged" in done.err
    assert done.json["data"]["router"] == "mean"
    assert AutoModelForCausalLM.from_pretrained(out).config.num_experts == 2
    assert logits(out).isfinite().all()
    record = json.loads((out / "record.json").read_text())
    assert record["command"] == "compress condense"
    assert record["options"]["grouping"] == "hierarchical"
    assert set(done.json["quality"]["bits_per_byte"]) == {"words"}
    assert "hierarchical" in (out / "README.md").read_text()


def test_packed_shares_what_rows_lead_to(
    moekit: Any, tiny: Path, text: Path, tmp_path: Path
) -> None:
    """An alias table by itself: half of the experts, all rows of the router, one copy each."""
    asked = ["--ratio", 0.5, "--data", text, "--eval", text, "--json"]
    packed = moekit(
        "compress",
        "condense",
        tiny,
        tmp_path / "packed",
        "--to",
        "packed",
        "--codec",
        "fp32",
        *asked,
    )
    assert packed.code == 0, packed.err
    assert packed.json["data"]["router"] == "alias"
    copies = moekit("compress", "condense", tiny, tmp_path / "copies", "--router", "alias", *asked)
    assert packed.json["bytes"] < copies.json["bytes"]
    found = [d.json["quality"]["bits_per_byte"]["words"] for d in (packed, copies)]
    # The same weights in the same order of experts.
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_nothing_merged_is_the_model(moekit: Any, tiny: Path, text: Path, tmp_path: Path) -> None:
    done = moekit("compress", "condense", tiny, tmp_path / "out", "--ratio", 0, "--data", text)
    assert done.code == 0, done.err
    assert torch.equal(logits(tmp_path / "out"), logits(tiny))


def test_plan_and_statistics_are_applied_later(
    moekit: Any, tiny: Path, text: Path, tmp_path: Path
) -> None:
    """A fitted plan names its statistics, and convert gives what condense does at once."""
    asked = [
        "--ratio", 0.5, "--method", "pleas", "--router", "mean", "--data", text,
    ]  # fmt: skip
    once = moekit("compress", "condense", tiny, tmp_path / "once", *asked)
    assert once.code == 0, once.err
    planned = moekit(
        "compress", "condense", tiny, *asked, "--plan-only", tmp_path / "plan.json",
        "--save-stats", tmp_path / "stats",
    )  # fmt: skip
    assert planned.code == 0, planned.err
    plan = ExpertPlan.load(tmp_path / "plan.json")
    assert plan.fit is not None
    assert plan.fit.stats == str(tmp_path / "stats")
    applied = moekit(
        "convert", tiny, tmp_path / "later", "--to", "fused", "--plan", tmp_path / "plan.json"
    )
    assert applied.code == 0, applied.err
    assert torch.equal(logits(tmp_path / "once"), logits(tmp_path / "later"))


def test_grouping_and_fuser_are_named_with_options(
    moekit: Any, tiny: Path, text: Path, tmp_path: Path
) -> None:
    done = moekit(
        "compress", "condense", tiny, "--ratio", 0.5, "--data", text,
        "--grouping", "hierarchical:feature=weights,linkage=complete", "--fuser", "average",
        "--align", "weights", "--protect", "0:1", "--plan-only", tmp_path / "plan.json", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.json["data"]["grouping_options"] == {"feature": "weights", "linkage": "complete"}
    assert ExpertPlan.load(tmp_path / "plan.json").action(0, 1).protect


def test_dry_run_says_the_size_and_runs_nothing(
    moekit: Any, tiny: Path, text: Path, tmp_path: Path
) -> None:
    asked = ["compress", "condense", tiny, tmp_path / "out", "--ratio", 0.5, "--data", text]
    forecast = moekit(*asked, "--dry-run", "--json")
    assert forecast.code == 0, forecast.err
    assert not (tmp_path / "out").exists()
    assert moekit(*asked, "--json").json["bytes"] == forecast.json["bytes"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["--ratio", 0.5], "either --stats"),
        (["--data", "TEXT"], "--ratio, --experts, --size"),
        (["--experts", 1, "--data", "TEXT"], "its router needs 2"),
        (["--ratio", 0.5, "--data", "TEXT", "--method", "hcsmoe"], "did you mean hc-smoe"),
        (["--ratio", 0.5, "--data", "TEXT", "--fuser", "zip:tau=1"], "no option 'tau'"),
        (["--ratio", 0.5, "--data", "TEXT", "--grouping", "dominant:capacity=x"], "is int"),
        (["--ratio", 0.5, "--data", "TEXT", "--align", "colour"], "none, weights, activations"),
        (["--ratio", 0.5, "--data", "TEXT", "--protect", "7:1"], "layer 7"),
        (["--ratio", 0.5, "--data", "TEXT", "--protect", "here"], "LAYER:EXPERT"),
        (["--ratio", 0.5, "--data", "nowhere"], "nowhere"),
    ],
)  # fmt: skip
def test_refusals(
    refused: Any, tiny: Path, text: Path, tmp_path: Path, asked: list[Any], message: str
) -> None:
    given = [text if part == "TEXT" else part for part in asked]
    assert message in refused("compress", "condense", tiny, tmp_path / "out", *given)
    assert not (tmp_path / "out").exists()


def test_a_fitted_plan_alone_needs_kept_statistics(
    refused: Any, tiny: Path, text: Path, tmp_path: Path
) -> None:
    message = refused(
        "compress", "condense", tiny, "--ratio", 0.5, "--method", "pleas", "--data", text,
        "--plan-only", tmp_path / "plan.json",
    )  # fmt: skip
    assert "--save-stats" in message
