"""Results side by side: seeds become rows, the front holds what nothing beats."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from pathlib import Path

import pytest

from moekit.core.errors import UserError
from moekit.core.load import load
from moekit.core.record import start_record
from moekit.evaluate.quality import QUALITY, QUALITY_BEFORE, Quality, measure_quality, text_hash
from moekit.evaluate.results import compare_results, pareto_front, read_result
from moekit.evaluate.text import Sample
from tests.models import write_tiny_model

BEFORE = Quality({"code": 1.0, "news": 2.0}, "t" * 16, 512, 256)


def write(
    directory: Path,
    loss: float,
    size: int,
    seed: int = 0,
    quality: Quality | None = BEFORE,
    calibration: str | None = None,
    **options: object,
) -> Path:
    directory.mkdir(parents=True)
    given = {"out": str(directory), "plan": str(directory), "stats": calibration, **options}
    record = start_record("compress prune", given, seed=seed)
    metrics: dict[str, object] = {"bytes": size, QUALITY_BEFORE: BEFORE.to_dict()}
    if quality is not None:
        bits = {name: value + loss for name, value in quality.bits_per_byte.items()}
        metrics[QUALITY] = dataclasses.replace(quality, bits_per_byte=bits).to_dict()
    record.finish(metrics).save(directory)
    return directory


def test_seeds_of_one_setting_are_one_row(tmp_path: Path) -> None:
    made = [
        write(tmp_path / f"{method}{seed}", loss + seed / 10, 100, seed, method=method, ratio=0.5)
        for method, loss in (("reap", 0.1), ("random", 0.5))
        for seed in range(3)
    ]
    compared = compare_results([read_result(path) for path in made], size_before=200)
    assert [row.label for row in compared.rows] == ["reap", "random"]
    reap, other = compared.rows
    assert reap.seeds == [0, 1, 2]
    # Of 0.1, 0.2, 0.3 above the mean 1.5 of the domains before.
    assert reap.loss.mean == pytest.approx(1.7)
    assert reap.loss.deviation == pytest.approx(0.1)
    assert reap.increase is not None
    assert reap.increase.mean == pytest.approx(0.2)
    assert reap.domains["news"].mean == pytest.approx(2.2)
    assert (reap.on_front, other.on_front) == (True, False)
    assert compared.before == BEFORE
    json.dumps(compared.to_dict(), allow_nan=False)


def test_the_label_holds_what_differs(tmp_path: Path) -> None:
    made = [
        write(tmp_path / str(ratio), ratio, int(100 / ratio), method="reap", ratio=ratio, scope="l")
        for ratio in (0.25, 0.5)
    ]
    compared = compare_results([read_result(path) for path in made])
    assert [row.label for row in compared.rows] == ["reap, ratio 0.5", "reap, ratio 0.25"]


def test_the_front_is_what_nothing_dominates() -> None:
    draw = random.Random(3)
    points = [(draw.randrange(9), draw.randrange(9)) for _ in range(40)]
    front = pareto_front(points)
    for place, (size, loss) in enumerate(points):
        beaten = any(
            other != (size, loss) and other[0] <= size and other[1] <= loss for other in points
        )
        # Of equal points the first alone is on the front.
        assert (place in front) == (not beaten and points.index((size, loss)) == place)


def test_what_does_not_compare_is_refused(tmp_path: Path) -> None:
    good = read_result(write(tmp_path / "a", 0.1, 10, method="reap"))
    for changed in (
        dataclasses.replace(BEFORE, text="u" * 16),
        dataclasses.replace(BEFORE, context=128),
    ):
        other = read_result(
            write(tmp_path / changed.text / str(changed.context), 0.1, 10, 1, changed)
        )
        with pytest.raises(UserError, match="different text or windows"):
            compare_results([good, other])
    missing = read_result(write(tmp_path / "c", 0.1, 10, quality=None))
    with pytest.raises(UserError, match="no quality"):
        compare_results([good, missing])
    again = read_result(write(tmp_path / "d", 0.1, 10, method="reap"))
    with pytest.raises(UserError, match="one run with seed 0"):
        compare_results([good, again])
    with pytest.raises(UserError, match="no results"):
        compare_results([])
    with pytest.raises(UserError, match="cannot be read"):
        read_result(tmp_path)


def test_unmatched_calibration_is_said(tmp_path: Path) -> None:
    def notes(texts: tuple[str, str]) -> list[str]:
        made = [
            write(tmp_path / "".join(texts) / m, 0.1, 10, method=m, calibration=text)
            for m, text in zip(("reap", "random"), texts, strict=True)
        ]
        return compare_results([read_result(path) for path in made]).notes

    assert notes(("x", "x")) == []
    assert "seed 0" in notes(("x", "y"))[0]


def test_the_text_hash_tells_texts_domains_and_borders_apart() -> None:
    samples = [Sample("ab", "c"), Sample("a", "bc"), Sample("ab", "d")]
    hashes = {text_hash(list(some)) for n in (1, 2) for some in itertools.permutations(samples, n)}
    assert len(hashes) == 9


def test_measured_quality_reads_back(tmp_path: Path) -> None:
    loaded = load(write_tiny_model(tmp_path / "tiny"))
    samples = [Sample("some words here", "a"), Sample("other words", "b")]
    quality = measure_quality(loaded.model, loaded.tokenizer, samples, context=16)
    assert set(quality.bits_per_byte) == {"a", "b"}
    assert (quality.context, quality.stride) == (16, 8)
    assert Quality.from_dict(json.loads(json.dumps(quality.to_dict()))) == quality
    with pytest.raises(UserError, match="somewhere"):
        Quality.from_dict({"bits_per_byte": 3}, "somewhere")
