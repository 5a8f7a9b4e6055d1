"""ComPEFT: three values, the code near its entropy, and the way back to a whole model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moekit.core.errors import UserError
from moekit.core.task_vector import decode, encode, rice_bits
from moekit.merge.compeft import compress_task_vector
from moekit.merge.recipe import merge_from_dict
from moekit.merge.run import merge
from tests.merge.models import write_family


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("compeft"))


@pytest.mark.parametrize("density", [0.05, 0.1, 0.2, 0.5])
def test_the_code_is_near_its_entropy_and_exact(density: float) -> None:
    draw = np.random.default_rng(0)
    entries = 200_000
    positions = np.flatnonzero(draw.random(entries) < density)
    negative = draw.random(len(positions)) < 0.5
    code = encode(positions, negative, rice_bits(density))
    back, signs = decode(code, len(positions), rice_bits(density))
    assert np.array_equal(back, positions)
    assert np.array_equal(signs < 0, negative)
    least = density - density * np.log2(density) - (1 - density) * np.log2(1 - density)
    # A Rice code costs at most a few percent over the entropy of a geometric distribution.
    assert 8 * code.numel() / entries < 1.05 * least


@pytest.mark.parametrize("count", [0, 1])
def test_codes_of_almost_nothing(count: int) -> None:
    positions = np.arange(count) * 7
    code = encode(positions, np.zeros(count, dtype=bool), 3)
    assert np.array_equal(decode(code, count, 3)[0], positions)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(path).state_dict())


def whole(model: Path, out: Path) -> dict[str, torch.Tensor]:
    merge(merge_from_dict({"merge_method": "passthrough", "models": [{"model": str(model)}]}), out)
    return weights(out)


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_a_model_comes_back_with_three_values(tmp_path, moe) -> None:
    family = write_family(tmp_path / "models", moe=moe)
    done = compress_task_vector(family / "a", family / "base", tmp_path / "small", density=0.2)
    base, tuned = weights(family / "base"), weights(family / "a")
    found = whole(tmp_path / "small", tmp_path / "out")
    delta = torch.cat([(tuned[n] - base[n]).flatten() for n in base])
    back = torch.cat([(found[n] - base[n]).flatten() for n in base])
    moved = back.abs() > done.size / 2
    assert done.entries == len(delta)
    assert int(moved.sum()) == done.kept == int(0.2 * len(delta)) + 1
    # Adding to a base rounds once.
    torch.testing.assert_close(back[moved], delta.sign()[moved] * done.size, atol=1e-6, rtol=0)
    assert float(back[~moved].abs().max()) < 1e-6
    assert float(delta.abs()[moved].min()) >= float(delta.abs()[~moved].max()) - 1e-7


def test_the_mean_of_what_stays_loses_least(family, tmp_path) -> None:
    best = compress_task_vector(family / "a", family / "base", tmp_path / "best")
    deviation = best.size / 1.0
    for number, alpha in enumerate((0.5, 1.0, 3.0)):
        other = compress_task_vector(
            family / "a", family / "base", tmp_path / str(number), alpha=alpha
        )
        assert best.error <= other.error
        deviation = other.size / alpha
    delta = torch.cat(
        [
            (weights(family / "a")[name] - tensor).flatten()
            for name, tensor in weights(family / "base").items()
        ]
    )
    assert deviation == pytest.approx(float(delta.std(correction=0)), rel=1e-4)


def test_what_cannot_be_compressed_or_read(family, tmp_path) -> None:
    with pytest.raises(UserError, match="between 0 and 1"):
        compress_task_vector(family / "a", family / "base", tmp_path / "x", density=1.0)
    with pytest.raises(UserError, match="no task vector"):
        compress_task_vector(family / "a", family / "a", tmp_path / "x")
    compress_task_vector(family / "a", family / "base", tmp_path / "small")
    head = json.loads((tmp_path / "small" / "task_vector.json").read_text())
    head["base"] = str(family / "b")
    (tmp_path / "small" / "task_vector.json").write_text(json.dumps(head))
    with pytest.raises(UserError, match="made for another"):
        whole(tmp_path / "small", tmp_path / "out")
    head["version"] = 9
    (tmp_path / "small" / "task_vector.json").write_text(json.dumps(head))
    with pytest.raises(UserError, match="no task vector that this moekit reads"):
        whole(tmp_path / "small", tmp_path / "out")
    assert load_file(tmp_path / "small" / "task_vector.safetensors")
