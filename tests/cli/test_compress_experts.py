"""`moekit compress compressed-experts`: a file of vectors beside an unchanged model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.models import TEXT


def test_vectors_are_written_and_measured(moekit: Any, tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "words.txt"
    text.write_text(TEXT * 20, encoding="utf-8")
    done = moekit(
        "compress", "compressed-experts", tiny, "--out", tmp_path / "vectors.safetensors",
        "--auxiliary", 1, "--data", text, "--max-tokens", 512, "--passes", 3, "--batch-size", 2,
        "--eval", text, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.json["losses"][-1] < done.json["losses"][0]
    quality = {name: q["bits_per_byte"]["words"] for name, q in done.json["quality"].items()}
    assert quality["compressed experts"] < quality["main experts"]
    assert (tmp_path / "vectors.safetensors").is_file()


def test_too_many_auxiliary_choices_are_refused(refused: Any, tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "words.txt"
    text.write_text(TEXT, encoding="utf-8")
    message = refused(
        "compress", "compressed-experts", tiny, "--out", tmp_path / "out", "--auxiliary", 2,
        "--data", text,
    )  # fmt: skip
    assert "1 to 1" in message
