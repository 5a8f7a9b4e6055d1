"""`moekit merge`: recipes as a user writes them, what loads afterwards, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from moekit.core.load import load
from moekit.core.writer import CheckpointWriter


@pytest.fixture(scope="module")
def twins(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the tiny model as `base`, and `a` and `b` that moved away from it."""
    root = tmp_path_factory.mktemp("merge")
    for number, name in enumerate(("base", "a", "b")):
        loaded = load(tiny)
        draw = torch.Generator().manual_seed(number)
        if number:
            with torch.no_grad():
                for parameter in loaded.model.parameters():
                    parameter += 0.01 * torch.randn(parameter.shape, generator=draw)
        loaded.model.save_pretrained(root / name)
        loaded.tokenizer.save_pretrained(root / name)
    return root


def write(path: Path, **recipe: Any) -> Path:
    path.write_text(yaml.safe_dump(recipe))
    return path


def models(root: Path, **parameters: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"model": str(root / name)} for name in ("a", "b")]
    return [{**one, "parameters": parameters} if parameters else one for one in found]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(path).state_dict())


def test_the_average_loads_in_transformers(moekit, twins, tmp_path) -> None:
    template = "{{ messages[0]['content'] }}"
    recipe = write(
        tmp_path / "r.yaml",
        merge_method="linear",
        models=models(twins, weight=1.0),
        chat_template=template,
    )
    done = moekit("merge", recipe, tmp_path / "out", "--json")
    assert done.code == 0, done.err
    merged, a, b = (weights(path) for path in (tmp_path / "out", twins / "a", twins / "b"))
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, (a[name] + b[name]) / 2)
    assert done.json["tensors"] > 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "linear" in card
    assert str(twins / "a") in card
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == template
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["command"] == "merge"
    assert moekit("run", tmp_path / "out", "the router", "--max-new-tokens", 2).code == 0


def test_a_method_by_filter_and_a_gradient_over_depth(moekit, twins, tmp_path) -> None:
    recipe = write(
        tmp_path / "r.yaml",
        merge_method="task_arithmetic",
        base_model=str(twins / "base"),
        models=models(twins, weight=[{"filter": "experts", "value": [0.0, 1.0]}, {"value": 0.5}]),
        rules=[{"filter": "norm", "merge_method": "linear", "parameters": {"weight": 1.0}}],
    )
    assert moekit("merge", recipe, tmp_path / "out").code == 0
    merged, base, a, b = (
        weights(path) for path in (tmp_path / "out", *(twins / n for n in ("base", "a", "b")))
    )
    last = max(int(name.split(".")[2]) for name in merged if ".layers." in name)
    for name, tensor in merged.items():
        both = a[name] + b[name] - 2 * base[name]
        if "norm" in name:
            expected = (a[name] + b[name]) / 2
        elif "experts" in name and ".layers.0." in name:
            expected = base[name]
        elif "experts" in name and f".layers.{last}." in name:
            expected = base[name] + both
        elif "experts" not in name:
            expected = base[name] + both / 2
        else:
            continue
        torch.testing.assert_close(tensor, expected, msg=name)


def test_steps_are_the_merges_done_by_hand(moekit, twins, tmp_path) -> None:
    base = str(twins / "base")
    half = {"merge_method": "slerp", "base_model": base, "parameters": {"t": 0.5}}
    first = {**half, "models": [{"model": base}, {"model": str(twins / "a")}]}
    last = {"merge_method": "linear"}
    chain = write(
        tmp_path / "chain.yaml",
        steps=[
            {**first, "name": "back"},
            {
                **last,
                "models": [
                    {"model": m, "parameters": {"weight": 1.0}} for m in ("back", str(twins / "b"))
                ],
            },
        ],
    )
    assert moekit("merge", chain, tmp_path / "chain").code == 0
    assert moekit("merge", write(tmp_path / "1.yaml", **first), tmp_path / "one").code == 0
    by_hand = [
        {"model": str(m), "parameters": {"weight": 1.0}} for m in (tmp_path / "one", twins / "b")
    ]
    second = write(tmp_path / "2.yaml", **last, models=by_hand)
    assert moekit("merge", second, tmp_path / "two").code == 0
    one, two = weights(tmp_path / "chain"), weights(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in two)
    assert not (tmp_path / "chain.steps").exists()


def test_layers_are_stacked_by_slices(moekit, twins, tmp_path) -> None:
    layers = load(twins / "a").model.config.num_hidden_layers
    slices = [
        {"sources": [{"model": str(twins / "a"), "layer_range": [0, layers]}]},
        {"sources": [{"model": str(twins / "b"), "layer_range": [layers - 1, layers]}]},
    ]
    recipe = write(tmp_path / "r.yaml", merge_method="passthrough", slices=slices)
    assert moekit("merge", recipe, tmp_path / "out").code == 0
    merged, b = weights(tmp_path / "out"), weights(twins / "b")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == layers + 1
    for name, tensor in merged.items():
        if f".layers.{layers}." in name:
            assert torch.equal(tensor, b[name.replace(f".{layers}.", f".{layers - 1}.", 1)])
    assert torch.equal(merged["lm_head.weight"], b["lm_head.weight"])


def test_an_interrupted_merge_goes_on(moekit, twins, tmp_path, monkeypatch) -> None:
    given = models(twins, weight=1.0, density=0.5)
    recipe = write(
        tmp_path / "r.yaml", merge_method="dare_ties", base_model=str(twins / "base"), models=given
    )
    assert moekit("merge", recipe, tmp_path / "whole", "--seed", 3).code == 0
    count = 0
    rows = CheckpointWriter.write_rows

    def interrupted(*args: Any) -> None:
        nonlocal count
        count += 1
        if count == 7:
            raise KeyboardInterrupt
        rows(*args)

    monkeypatch.setattr(CheckpointWriter, "write_rows", interrupted)
    assert moekit("merge", recipe, tmp_path / "out", "--seed", 3).code == 130
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    done = moekit("merge", recipe, tmp_path / "out", "--seed", 3)
    assert done.code == 0, done.err
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert all(torch.equal(one[name], two[name]) for name in two)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"merge_method": "tie"}, "did you mean ties"),
        ({"merge_method": "ties"}, "ties needs a base_model"),
        ({"merge_method": "slerp", "base_model": "a"}, "needs the parameter t"),
        ({"parameters": {"wieght": 1}}, "did you mean weight"),
        ({"parameters": {"density": -0.5}, "merge_method": "ties"}, "density is -0.5"),
        ({"models": []}, "not a list of at least one"),
        ({"dtype": "int3"}, "dtype 'int3' is unknown"),
        ({"merge_methods": 1}, "Did you mean 'merge_method'"),
        ({"modules": {}}, "several towers"),
        ({"chat_template": "chatml"}, "Jinja template"),
        ({"align": "neurons"}, "there is experts"),
        ({"tokenizer_source": "unoin"}, "there are union, base"),
        ({"dialect": "french"}, "mergekit and paper"),
        ({"slices": []}, "exactly one of models and slices"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_bad_recipes(refused, twins, tmp_path, changes, words) -> None:
    recipe: dict[str, Any] = {"merge_method": "linear", "models": models(twins, weight=1.0)}
    recipe |= changes
    if recipe.get("base_model") == "a":
        recipe["base_model"] = str(twins / "a")
        recipe["models"] = recipe["models"][1:]
        recipe["models"][0].pop("parameters")
    told = refused("merge", write(tmp_path / "r.yaml", **recipe), tmp_path / "out")
    assert words in told, told
    assert not (tmp_path / "out.partial").exists()


def test_models_that_do_not_fit(refused, twins, tmp_path) -> None:
    assert "cannot be read" in refused("merge", tmp_path / "none.yaml", tmp_path / "out")
    given = [*models(twins, weight=1.0), {"model": "babel", "parameters": {"weight": 1.0}}]
    recipe = write(tmp_path / "r.yaml", merge_method="linear", models=given)
    told = refused("merge", recipe, tmp_path / "out")
    assert "differ in their layers" in told


def test_layers_are_swapped_by_slices(moekit, twins, tmp_path) -> None:
    """Bottom from one parent, the mean in between, the rest from the other (2410.01335)."""
    own, other = ({"model": str(twins / name)} for name in ("a", "b"))

    def layers(first: int, last: int, *sources: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {"sources": [{**one, "layer_range": [first, last]} for one in sources], **more}

    mean = {"merge_method": "linear", "parameters": {"weight": 1.0}}
    recipe = write(
        tmp_path / "r.yaml",
        merge_method="passthrough",
        slices=[layers(0, 1, own), layers(1, 2, own, other, **mean)],
    )
    done = moekit("merge", recipe, tmp_path / "out")
    assert done.code == 0, done.err
    merged, a, b = (weights(path) for path in (tmp_path / "out", twins / "a", twins / "b"))
    assert len(merged) == len(a)
    for name, tensor in merged.items():
        expected = a[name] if ".layers.0." in name or "embed" in name else (a[name] + b[name]) / 2
        torch.testing.assert_close(tensor, expected, msg=name)


def test_experts_compete_alone_where_the_recipe_says_so(moekit, twins, tmp_path) -> None:
    given = {
        "merge_method": "ties",
        "base_model": str(twins / "base"),
        "models": [{"model": str(twins / "a"), "parameters": {"weight": 1.0, "density": 0.5}}],
    }
    base = weights(twins / "base")
    kept = {}
    for scope in ("tensor", "expert"):
        recipe = write(tmp_path / f"{scope}.yaml", scope=scope, **given)
        assert moekit("merge", recipe, tmp_path / scope).code == 0
        merged = weights(tmp_path / scope)
        name = next(name for name in merged if name.endswith("experts.down_proj"))
        kept[scope] = (merged[name] != base[name]).flatten(1).sum(1)
    entries = base[name][0].numel()
    assert kept["expert"].tolist() == [entries // 2] * len(base[name])
    assert kept["tensor"].sum() == kept["expert"].sum()
    assert kept["tensor"].tolist() != kept["expert"].tolist()


def test_text_on_the_command_line(moekit, refused, twins, tmp_path) -> None:
    recipe = write(tmp_path / "r.yaml", merge_method="regmean", models=models(twins))
    assert "--data" in refused("merge", recipe, tmp_path / "out")
    text = tmp_path / "text.txt"
    text.write_text("the router chooses two experts for every token. " * 20)
    options = ("--data", text, "--max-tokens", 64, "--seq-len", 32)
    done = moekit("merge", recipe, tmp_path / "out", *options)
    assert done.code == 0, done.err
    assert not (tmp_path / "out.prepared").exists()
    written = json.loads((tmp_path / "out" / "moekit_merge.json").read_text())
    assert written["text"]["max_tokens"] == 64


def test_compressed_fine_tunes_are_merged_as_models(moekit, twins, tmp_path) -> None:
    for name in "ab":
        done = moekit(
            *("compress", "task-vector", twins / name, tmp_path / name),
            *("--base", twins / "base", "--density", 0.3, "--json"),
        )
        assert done.code == 0, done.err
        # Small tensors end in the middle of a byte.
        assert done.json["bits_per_entry"] < 1.05 * done.json["entropy"] + 0.05
    linear = write(tmp_path / "r.yaml", merge_method="linear", models=models(tmp_path, weight=1.0))
    assert moekit("merge", linear, tmp_path / "out").code == 0
    whole = []
    for name in "ab":
        alone = write(
            tmp_path / "w.yaml",
            merge_method="passthrough",
            models=[{"model": str(tmp_path / name)}],
        )
        assert moekit("merge", alone, tmp_path / f"whole-{name}").code == 0
        whole.append(weights(tmp_path / f"whole-{name}"))
    merged = weights(tmp_path / "out")
    for name, tensor in merged.items():
        assert torch.allclose(tensor, (whole[0][name] + whole[1][name]) / 2, atol=1e-6)
