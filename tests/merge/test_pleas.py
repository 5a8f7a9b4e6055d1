"""PLeaS: permuted twins come back exactly, wider merges hold both models, fits never lose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from moekit.core.errors import UserError
from moekit.merge.decoder_groups import decoder_groups
from moekit.merge.recipe import MergeRecipe, merge_from_dict
from moekit.merge.run import merge
from moekit.ops.regression import solved
from moekit.ops.widened import Pairing, merged_matrix
from tests.merge.models import write_family


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, `twin` (its units in another order) and `a` (moved away)."""
    root = write_family(tmp_path_factory.mktemp("pleas"), count=1)
    model = AutoModelForCausalLM.from_pretrained(root / "base")
    state = dict(model.state_dict())
    groups = decoder_groups(model, list(state))
    draw = torch.Generator().manual_seed(4)
    orders = {name: torch.randperm(n, generator=draw) for name, n in groups.units.items()}
    model.load_state_dict(groups.permuted(state, orders))
    model.save_pretrained(root / "twin")
    for path in (root / "base").glob("tokenizer*"):
        (root / "twin" / path.name).write_bytes(path.read_bytes())
    return root


def recipe(root: Path, *models: str, **parameters: Any) -> MergeRecipe:
    return merge_from_dict(
        {
            "merge_method": "pleas",
            "models": [{"model": str(root / name)} for name in models],
            "parameters": parameters,
            "data": {"files": str(root / "a.txt"), "max_tokens": 96, "seq_len": 48},
        }
    )


def logits(path: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(path)
    ids = torch.arange(5, 29).unsqueeze(0)
    with torch.no_grad():
        return model(ids).logits


def test_permuting_units_changes_nothing(family) -> None:
    # Sums in another order.
    torch.testing.assert_close(logits(family / "twin"), logits(family / "base"), atol=1e-4, rtol=0)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_a_permuted_twin_is_recovered(family, tmp_path, ratio) -> None:
    merge(recipe(family, "base", "twin", ratio=ratio), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(family / "base")
    assert model.config.intermediate_size == round(base.config.intermediate_size * (1 + ratio))
    torch.testing.assert_close(logits(tmp_path / "out"), logits(family / "base"), atol=1e-3, rtol=0)
    if ratio == 0:
        for name, tensor in base.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], tensor, atol=1e-4, rtol=0)


def test_matching_beats_merging_by_index(family, tmp_path) -> None:
    merge(recipe(family, "base", "twin"), tmp_path / "aligned")
    by_index = merge_from_dict(
        {
            "merge_method": "linear",
            "models": [
                {"model": str(family / n), "parameters": {"weight": 1.0}} for n in ("base", "twin")
            ],
        }
    )
    merge(by_index, tmp_path / "index")
    wanted = logits(family / "base")
    errors = [float((logits(tmp_path / n) - wanted).norm()) for n in ("aligned", "index")]
    assert errors[0] < 1e-3 * errors[1]


def test_a_fit_never_loses_to_the_blocks_it_starts_from() -> None:
    draw = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 6, 8, generator=draw)
    one, two = torch.randn(2, 40, 8, generator=draw)
    moment = torch.cat([one, two], 1).T @ torch.cat([one, two], 1)
    for ratio in (0.0, 0.5, 1.0):
        columns = Pairing.by_similarity(torch.rand(8, generator=draw), ratio)
        rows = Pairing.whole(6)
        start = merged_matrix(first, second, rows, columns, None)
        made = merged_matrix(first, second, rows, columns, moment)
        read = columns.read(torch.cat([one, two], 1).T).T
        target = (one @ first.T + two @ second.T) / 2
        errors = [float((read @ w.T - target).norm()) for w in (made, start)]
        assert errors[0] <= errors[1] * (1 + 1e-6)
        if ratio == 1:
            # Side by side: nothing is left to fit.
            assert errors[1] < 1e-4


def test_separate_units_must_not_meet_those_of_the_other() -> None:
    half = Pairing.by_similarity(torch.arange(4.0), 0.5)
    with pytest.raises(ValueError, match="all be merged"):
        merged_matrix(torch.ones(4, 4), torch.ones(4, 4), half, half, None)


def test_without_inputs_the_centre_stays() -> None:
    centre = torch.ones(2, 3)
    zero = torch.zeros(3, 3, dtype=torch.float64)
    assert torch.equal(solved(zero, torch.zeros(2, 3, dtype=torch.float64), centre), centre)


def test_what_pleas_does_not_merge(family, tmp_path) -> None:
    with pytest.raises(UserError, match="from 0 to 1"):
        merge(recipe(family, "base", "twin", ratio=2), tmp_path / "out")
    moe = write_family(tmp_path / "moe", moe=True, count=1)
    with pytest.raises(UserError, match="align: experts"):
        merge(recipe(moe, "base", "a"), tmp_path / "out")
