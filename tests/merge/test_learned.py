"""Methods that learn from text: closed forms, what stays the same, and that the loss goes down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from moekit.core.errors import UserError
from moekit.merge.learned import COEFFICIENTS_FILE
from moekit.merge.mixture import token_loss
from moekit.merge.recipe import MergeRecipe, merge_from_dict
from moekit.merge.run import merge
from tests.merge.models import write_family


@pytest.fixture(scope="module", params=["dense", "moe"])
def family(request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp(request.param), moe=request.param == "moe")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("dense"), count=3)


def recipe(
    root: Path, method: str, models: str = "ab", base: bool = True, **more: Any
) -> MergeRecipe:
    content: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": str(root / m), "data": str(root / f"{m}.txt")} for m in models],
        "data": {"files": str(root / "a.txt"), "max_tokens": 96, "seq_len": 16},
        **more,
    }
    if base:
        content["base_model"] = str(root / "base")
    return merge_from_dict(content)


def merged(out: Path, *given: Any, **more: Any) -> dict[str, Tensor]:
    merge(recipe(*given, **more), out)
    assert not out.with_name(out.name + ".prepared").exists()
    return weights(out)


def weights(path: Path) -> dict[str, Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(path).state_dict())


def close(one: dict[str, Tensor], two: dict[str, Tensor], atol: float = 1e-5) -> None:
    for name, tensor in two.items():
        torch.testing.assert_close(one[name], tensor, atol=atol, rtol=0, msg=name)


def test_fisher_is_the_formula_on_its_statistics(family, tmp_path) -> None:
    found = merged(tmp_path / "out", family, "fisher", base=False, parameters={"floor_all": True})
    a, b = weights(family / "a"), weights(family / "b")
    outside = 0
    for name, tensor in found.items():
        low, high = torch.minimum(a[name], b[name]), torch.maximum(a[name], b[name])
        # A weighted mean lies between what it is the mean of.
        assert bool(((tensor >= low - 1e-6) & (tensor <= high + 1e-6)).all()), name
        outside += int(not torch.allclose(tensor, (a[name] + b[name]) / 2, atol=1e-4))
    assert outside > len(found) / 2


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_twins_merge_to_themselves(family, tmp_path, method) -> None:
    close(merged(tmp_path / "out", family, method, "aa", base=False), weights(family / "a"))


def test_regmean_without_off_diagonals_weighs_columns(dense, tmp_path) -> None:
    found = merged(
        tmp_path / "out", dense, "regmean", base=False, parameters={"scale": 0.0, "ridge": 1e-9}
    )
    a, b = weights(dense / "a"), weights(dense / "b")
    name = "model.layers.1.mlp.down_proj.weight"
    share = (found[name] - b[name]) / (a[name] - b[name])
    # One share for each column, whatever the row.
    sure = (a[name] - b[name]).abs() > 0.01
    for column in range(share.shape[1]):
        values = share[sure[:, column], column]
        assert float(values.max() - values.min()) < 1e-2
    assert torch.allclose(
        found["model.norm.weight"], (a["model.norm.weight"] + b["model.norm.weight"]) / 2
    )


def test_regmean_is_the_minimum_of_its_objective(dense, tmp_path) -> None:
    from moekit.merge.preparation import assembled
    from moekit.merge.sources import MergeSources
    from moekit.profile.parameter_inputs import parameter_inputs

    given = {"scale": 1.0, "ridge": 1e-9}
    found = merged(tmp_path / "out", dense, "regmean", base=False, parameters=given)
    name = "model.layers.0.mlp.up_proj.weight"
    gradient = torch.zeros_like(found[name], dtype=torch.float64)
    scale = 0.0
    with MergeSources([str(dense / "a"), str(dense / "b")], Path) as sources:
        for source in sources.by_name.values():
            from moekit.merge.preparation import Preparation

            room = Preparation(recipe(dense, "regmean", base=False), sources, tmp_path, 0)
            network = assembled(source)
            inputs = parameter_inputs(network, room.sequences(source.name), "second")
            moment = inputs.values[name].double()
            own = network.get_parameter(name).detach().double()
            gradient += (found[name].double() - own) @ moment
            scale += float((own @ moment).abs().max())
    # float32 weights; the ridge is below their rounding.
    assert float(gradient.abs().max()) < 1e-5 * scale


def test_aim_moves_important_columns_least(dense, tmp_path) -> None:
    plain = weights(dense / "a")
    same = merged(tmp_path / "one", dense, "aim", "a", parameters={"omega": 1.0})
    close(same, plain, atol=1e-6)
    none = merged(tmp_path / "zero", dense, "aim", "a", parameters={"omega": 0.0})
    base = weights(dense / "base")
    name = "model.layers.0.self_attn.q_proj.weight"
    equal = (none[name] - base[name]).abs().amax(0) < 1e-7
    assert int(equal.sum()) == 1
    assert torch.equal(none["model.embed_tokens.weight"], plain["model.embed_tokens.weight"])


def test_sensitivities_of_twins_leave_the_weights(dense, tmp_path) -> None:
    found = merged(tmp_path / "out", dense, "sens", "aa", parameters={"weight": 0.5})
    close(found, weights(dense / "a"))


def test_sensitive_layers_weigh_more(dense, tmp_path) -> None:
    merged(tmp_path / "out", dense, "sens", parameters={"temperature": 0.1})
    table = json.loads((tmp_path / "out" / COEFFICIENTS_FILE).read_text())["layers"]
    assert {"-1", "0", "1"} == set(table)
    for values in table.values():
        assert sum(values) == pytest.approx(2.0)


def test_adamerging_without_steps_is_task_arithmetic(family, tmp_path) -> None:
    found = merged(tmp_path / "out", family, "adamerging", parameters={"steps": 0, "init": 0.3})
    plain = recipe(family, "task_arithmetic", parameters={"weight": 0.3})
    merge(plain, tmp_path / "plain")
    close(found, weights(tmp_path / "plain"))


@pytest.mark.parametrize("granularity", ["task", "layer"])
def test_adamerging_lowers_the_loss(dense, tmp_path, granularity) -> None:
    given = {"granularity": granularity, "loss": "cross-entropy", "lr": 0.1, "batch": 8}
    losses = []
    for steps in (0, 12):
        out = tmp_path / str(steps)
        room = recipe(dense, "adamerging", "a", parameters={**given, "steps": steps, "init": 0.0})
        merge(room, out)
        losses.append(loss_of(out, dense))
    assert losses[1] < losses[0]
    table = json.loads((out / COEFFICIENTS_FILE).read_text())["tensors"]
    rows = list(table.values())
    assert (len({tuple(row) for row in rows}) == 1) == (granularity == "task")
    assert all(0 <= row[1] <= 1 for row in rows)


def loss_of(model: Path, root: Path) -> float:
    from moekit.core.load import load_tokenizer

    network = AutoModelForCausalLM.from_pretrained(model)
    ids = load_tokenizer(root / "base")((root / "a.txt").read_text())["input_ids"][:48]
    with torch.no_grad():
        return float(token_loss(network, torch.tensor([ids]), "cross-entropy"))


def test_trimmed_task_vectors_agree_in_sign(dense, tmp_path) -> None:
    found = merged(
        tmp_path / "out", dense, "adamerging", parameters={"steps": 0, "init": 1.0, "density": 0.2}
    )
    base = weights(dense / "base")
    moved = sum(int((found[name] != base[name]).sum()) for name in base)
    total = sum(tensor.numel() for tensor in base.values())
    # Each of two models keeps a fifth, and where both do one sign wins.
    assert 0.2 * total < moved <= 0.4 * total + 2


def test_an_interrupted_adamerging_goes_on(dense, tmp_path, monkeypatch) -> None:
    from moekit.merge.learned import Learner

    given = recipe(dense, "adamerging", parameters={"steps": 4, "batch": 2, "lr": 0.05})
    merge(given, tmp_path / "whole")
    losses, calls = Learner.losses, []

    def interrupted(self: Learner, step: int, models: Any = None) -> float:
        calls.append(step)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return losses(self, step, models)

    monkeypatch.setattr(Learner, "losses", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge(given, tmp_path / "out")
    merge(given, tmp_path / "out")
    assert calls == [0, 1, 2, 2, 3]
    whole, out = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "out"))
    assert all(torch.equal(whole[name], out[name]) for name in whole)


@pytest.mark.parametrize("granularity", ["task", "layer"])
@pytest.mark.parametrize("oracle", ["inner", "cosine"])
def test_frank_wolfe_stays_in_the_hull(dense, tmp_path, granularity, oracle) -> None:
    given = {"granularity": granularity, "oracle": oracle, "steps": 3, "batch": 4}
    merged(tmp_path / "out", dense, "fw_hard", "abc", parameters=given)
    table = json.loads((tmp_path / "out" / COEFFICIENTS_FILE).read_text())["tensors"]
    for row in table.values():
        assert sum(row) == pytest.approx(1.0)
        assert min(row) >= 0


def test_soft_frank_wolfe_lowers_the_loss(dense, tmp_path) -> None:
    given = {"loss": "cross-entropy", "start": "base", "lr": 0.05, "batch": 8, "init": 0.1}
    merged(
        tmp_path / "out", dense, "fw_soft", "a", parameters={**given, "steps": 2, "inner_steps": 6}
    )
    assert loss_of(tmp_path / "out", dense) <= loss_of(dense / "base", dense)


def test_text_is_asked_for(dense, tmp_path) -> None:
    given = merge_from_dict(
        {"merge_method": "regmean", "models": [{"model": str(dense / m)} for m in "ab"]}
    )
    with pytest.raises(UserError, match="--data"):
        merge(given, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="there are entropy, cross-entropy"):
        merge(recipe(dense, "adamerging", parameters={"loss": "l2"}), tmp_path / "out")
