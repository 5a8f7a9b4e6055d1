"""`moekit compress factorize`: what it writes, and what it refuses before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

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


def test_writes_what_the_factors_keep(moekit: Any, tiny: Path, text: Path, tmp_path: Path) -> None:
    done = moekit(
        "compress", "factorize", tiny, tmp_path / "out", "--method", "molae-white:group=2",
        "--ratio", 0.25, "--data", text, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.json["numbers"]["share of the experts' numbers"] <= 0.75
    assert not torch.equal(logits(tmp_path / "out"), logits(tiny))
    assert "molae-white" in (tmp_path / "out" / "README.md").read_text()


def test_full_rank_is_the_model(moekit: Any, tiny: Path, tmp_path: Path) -> None:
    done = moekit("compress", "factorize", tiny, tmp_path / "out", "--method", "svd", "--rank", 32)
    assert done.code == 0, done.err
    assert torch.equal(logits(tmp_path / "out"), logits(tiny))


def test_plan_with_energy_is_applied_later(
    moekit: Any, tiny: Path, text: Path, tmp_path: Path
) -> None:
    asked = ["compress", "factorize", tiny, "--method", "svd", "--energy", 0.9]
    planned = moekit(*asked, "--plan-only", tmp_path / "plan.json", "--json")
    assert planned.code == 0, planned.err
    assert all(1 <= rank < 32 for rank in planned.json["numbers"]["ranks"].values())
    assert moekit(*asked[:3], tmp_path / "once", *asked[3:]).code == 0
    later = moekit(
        "convert", tiny, tmp_path / "later", "--to", "fused", "--plan", tmp_path / "plan.json"
    )
    assert later.code == 0, later.err
    assert torch.equal(logits(tmp_path / "once"), logits(tmp_path / "later"))


def test_factors_themselves_are_written_and_evaluated(
    moekit: Any, tiny: Path, text: Path, tmp_path: Path
) -> None:
    asked = ["compress", "factorize", tiny, tmp_path / "out", "--method", "svd", "--rank", 6]
    done = moekit(*asked, "--factored", "--json")
    assert done.code == 0, done.err
    whole = sum(path.stat().st_size for path in tiny.glob("*.safetensors"))
    assert done.json["bytes"] < whole
    measured = moekit("eval", tmp_path / "out", text, "--json")
    assert measured.code == 0, measured.err
    asked[3] = tmp_path / "expanded"
    assert moekit(*asked).code == 0
    expanded = moekit("eval", tmp_path / "expanded", text, "--json")
    assert measured.json["mean_bpb"] == pytest.approx(expanded.json["mean_bpb"], abs=1e-3)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ([], "give one of --rank, --ratio, --energy"),
        (["--rank", 4], "either --stats"),
        (["--rank", 4, "--method", "svd", "--data", "README.md"], "looks at no text"),
        (["--rank", 99, "--method", "svd"], "--rank 99 is outside of 1 to 32"),
        (["--ratio", 0.9, "--method", "mole"], "out of reach"),
        (["--rank", 4, "--method", "mola"], "did you mean"),
        (["--rank", 4, "--method", "svd:size=3"], "no option 'size'"),
    ],
)
def test_refusals(refused: Any, tiny: Path, tmp_path: Path, asked: list[Any], message: str) -> None:
    assert message in refused("compress", "factorize", tiny, tmp_path / "out", *asked)
    assert not (tmp_path / "out").exists()
