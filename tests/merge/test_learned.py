"""Methods that learn from text: closed forms, what stays the same, and that the loss goes down."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from moekit.core.errors import UserError
from moekit.core.load import load_tokenizer
from moekit.merge import search
from moekit.merge.frank_wolfe import frank_wolfe
from moekit.merge.learner import Learner
from moekit.merge.mixture import token_loss
from moekit.merge.preparation import COEFFICIENTS_FILE, Preparation, assembled
from moekit.merge.recipe import MergeRecipe, merge_from_dict
from moekit.merge.run import merge
from moekit.merge.sources import MergeSources
from moekit.profile.parameter_inputs import parameter_inputs
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
    given = {"scale": 1.0, "ridge": 1e-9}
    found = merged(tmp_path / "out", dense, "regmean", base=False, parameters=given)
    name = "model.layers.0.mlp.up_proj.weight"
    gradient = torch.zeros_like(found[name], dtype=torch.float64)
    scale = 0.0
    with MergeSources([str(dense / "a"), str(dense / "b")], Path) as sources:
        for source in sources.by_name.values():
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


class Quadratic:
    """Half the squared distance of a weighted sum of points to a target, in place of a network."""

    def __init__(self, points: Tensor, target: Tensor) -> None:
        # The base comes first, and is no vertex of the hull.
        self._points = torch.cat([torch.zeros(1, points.shape[1]).double(), points])
        self._target = target

    @property
    def shape(self) -> tuple[int, int]:
        return 1, len(self._points)

    def set(self, weights: Tensor) -> None:
        self.place = weights[0] @ self._points

    def pull(self, cosine: bool = False) -> Tensor:
        assert not cosine
        return ((self.place - self._target) @ self._points.T).unsqueeze(0)


def walked(points: Tensor, target: Tensor, scratch: Path, steps: int = 300) -> Quadratic:
    class Room:
        def state(self, name: str) -> Path:
            return scratch / name

        def told(self, *_: Any) -> None: ...

    options = {"steps": steps, "step_size": 1.0, "start": "average", "oracle": "inner"}
    options |= {"granularity": "task", "loss": "none"}
    quadratic: Any = Quadratic(points, target)
    learner = Learner(quadratic, {}, options, Room(), 0)  # type: ignore[arg-type]
    learner.losses = lambda step, models=None: 0.0  # type: ignore[method-assign]
    quadratic.set(frank_wolfe(learner))
    return quadratic


def test_frank_wolfe_finds_the_nearest_point_of_the_hull(tmp_path) -> None:
    corners = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    (tmp_path / "far").mkdir()
    inside = torch.tensor([0.5, 0.3], dtype=torch.float64)
    outside = torch.tensor([2.0, 2.0], dtype=torch.float64)
    middle = torch.tensor([1.0, 1.0], dtype=torch.float64)
    for number, (target, nearest) in enumerate(((inside, inside), (outside, middle))):
        (tmp_path / str(number)).mkdir()
        found = walked(corners, target, tmp_path / str(number)).place
        # The error falls as 1 / steps, here 2 * diameter^2 / steps at most.
        assert float((found - nearest).square().sum()) < 2 * 8 / 300
    # A vertex that is never chosen changes nothing but the start.
    far = torch.cat([corners, torch.tensor([[-9.0, -9.0]], dtype=torch.float64)])
    found = walked(far, outside, tmp_path / "far").place
    assert float((found - middle).square().sum()) < 2 * 8 / 300 + 1e-9


def test_soft_frank_wolfe_lowers_the_loss(dense, tmp_path) -> None:
    given = {"loss": "cross-entropy", "start": "base", "lr": 0.05, "batch": 8, "init": 0.1}
    merged(
        tmp_path / "out", dense, "fw_soft", "a", parameters={**given, "steps": 2, "inner_steps": 6}
    )
    assert loss_of(tmp_path / "out", dense) <= loss_of(dense / "base", dense)


def test_a_directory_of_somebody_else_stays(dense, tmp_path) -> None:
    (tmp_path / "out.prepared").mkdir()
    (tmp_path / "out.prepared" / "notes.txt").write_text("mine")
    for restart in (False, True):
        with pytest.raises(UserError, match="not from moekit"):
            merge(recipe(dense, "regmean", base=False), tmp_path / "out", restart=restart)
    assert (tmp_path / "out.prepared" / "notes.txt").exists()


def test_text_is_asked_for(dense, tmp_path) -> None:
    given = merge_from_dict(
        {"merge_method": "regmean", "models": [{"model": str(dense / m)} for m in "ab"]}
    )
    with pytest.raises(UserError, match="--data"):
        merge(given, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="in a step before"):
        merge(recipe(dense, "regmean", base=False, tokenizer_source="union"), tmp_path / "out")
    with pytest.raises(UserError, match="there are entropy, cross-entropy"):
        merge(recipe(dense, "adamerging", parameters={"loss": "l2"}), tmp_path / "out")


def search_recipe(root: Path, method: str = "ties", **more: Any) -> MergeRecipe:
    content = {
        "merge_method": method,
        "base_model": str(root / "base"),
        "models": [
            {"model": str(root / m), "data": str(root / "a.txt"), "parameters": {"weight": 0.5}}
            for m in "ab"
        ],
        "data": {"max_tokens": 48, "seq_len": 24},
        "search": {"budget": 24, "groups": 2, **more},
    }
    return merge_from_dict(content)


def test_a_search_never_ends_above_the_recipe(dense, tmp_path) -> None:
    merge(search_recipe(dense, over=["weight", "density"], high=1.0), tmp_path / "out")
    found = json.loads((tmp_path / "out" / "moekit_search.json").read_text())
    plain = search_recipe(dense)
    merge(dataclasses.replace(plain, search=None), tmp_path / "plain")
    assert loss_of(tmp_path / "out", dense) <= loss_of(tmp_path / "plain", dense) + 1e-6
    assert found["tried"] >= 24
    # Two groups of layers and what lies outside of them.
    values = {json.dumps(row) for row in found["parameters"].values()}
    assert len(values) == 3


def test_an_interrupted_search_goes_on(dense, tmp_path, monkeypatch) -> None:
    given = search_recipe(dense, "linear")
    merge(given, tmp_path / "whole")
    loss, calls = search._Trial.loss, []

    def interrupted(self: Any, values: list[float]) -> float:
        calls.append(values)
        if len(calls) == 14:
            raise KeyboardInterrupt
        return loss(self, values)

    monkeypatch.setattr(search._Trial, "loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge(given, tmp_path / "out")
    merge(given, tmp_path / "out")
    whole, out = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "out"))
    assert all(torch.equal(whole[name], out[name]) for name in whole)


def test_searches_that_cannot_be_done(dense, tmp_path) -> None:
    with pytest.raises(UserError, match="search over gamma: ties has by model weight, density"):
        merge(search_recipe(dense, over="gamma"), tmp_path / "out")
    with pytest.raises(UserError, match="looks at the whole model first"):
        merge(search_recipe(dense, "sens"), tmp_path / "out")
    with pytest.raises(UserError, match="budget is -3"):
        search_recipe(dense, budget=-3)
