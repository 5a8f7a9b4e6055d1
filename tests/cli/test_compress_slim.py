"""`moekit compress slim`: narrower experts, trained between, that stock transformers loads."""

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
    path.write_text(TEXT * 20, encoding="utf-8")
    return path


def asked(tiny: Path, out: Path, text: Path) -> list[Any]:
    return ["compress", "slim", tiny, out, "--data", text, "--max-tokens", 512, "--batch-size", 2]


def test_trained_and_narrower(moekit: Any, tiny: Path, text: Path, tmp_path: Path) -> None:
    given = ["--width", 8, "--steps", 12, "--lr", 3e-3, "--eval", text, "--json"]
    done = moekit(*asked(tiny, tmp_path / "trained", text), *given)
    assert done.code == 0, done.err
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "trained").config
    assert config.moe_intermediate_size == 8
    given[3] = 0
    pruned = moekit(*asked(tiny, tmp_path / "pruned", text), *given)
    assert pruned.code == 0, pruned.err
    losses = [d.json["quality"]["bits_per_byte"]["words"] for d in (done, pruned)]
    assert losses[0] < losses[1]
    assert [len(stage) for stage in done.json["numbers"]["losses"]] == [12, 12]


def test_full_width_is_the_model(moekit: Any, tiny: Path, text: Path, tmp_path: Path) -> None:
    done = moekit(*asked(tiny, tmp_path / "out", text), "--ratio", 0, "--steps", 0)
    assert done.code == 0, done.err
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (tiny, tmp_path / "out")]
    with torch.no_grad():
        logits = [model(input_ids=torch.arange(10)[None]).logits for model in models]
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "either --width or --ratio"),
        (["--width", 99], "1 to 16"),
        (["--width", 8, "--stages", 0], "--stages"),
    ],
)
def test_refusals(
    refused: Any, tiny: Path, text: Path, tmp_path: Path, given: list[Any], message: str
) -> None:
    assert message in refused(*asked(tiny, tmp_path / "out", text), *given)


def test_a_plan_holds_no_training(refused: Any, tiny: Path, text: Path, tmp_path: Path) -> None:
    message = refused(
        "compress", "slim", tiny, "--data", text, "--width", 8, "--plan-only", tmp_path / "p.json"
    )
    assert "--steps 0" in message
