"""Merges as mergekit 0.1.5 makes them, from files that `benchmarks/merge_golden.py` wrote.

Float32 agrees to 1e-6. Bfloat16 agrees bit for bit outside of entries whose magnitudes tie at a
threshold: mergekit's sort does not say which of them stay, only how many.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.merge_golden import GOLDEN, recipe_of
from moekit.merge.plan import MergedTensor, plan_merge
from moekit.merge.recipe import merge_from_dict
from moekit.merge.run import merge
from moekit.merge.sources import MergeSources

# Two steps of bfloat16, relative.
STEP = 2**-7
FILES = sorted(path.stem for path in GOLDEN.glob("*.safetensors"))


def _recipes(file: str) -> list[str]:
    with safe_open(GOLDEN / f"{file}.safetensors", "pt") as opened:
        names = [key.split("/")[1] for key in opened.keys() if key.startswith("out/")]  # noqa: SIM118
    return sorted(set(names))


CASES = [(file, recipe) for file in FILES for recipe in _recipes(file)]


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models and mergekit's results as directories, FILE/MODEL and FILE/mergekit-RECIPE."""
    root = tmp_path_factory.mktemp("golden")
    for file in FILES:
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in load_file(GOLDEN / f"{file}.safetensors").items():
            side, which, name = key.split("/")
            place = which if side == "in" else f"mergekit-{which}"
            parts.setdefault(place, {})[name] = tensor
        for place, tensors in parts.items():
            (root / file / place).mkdir(parents=True)
            save_file(tensors, root / file / place / "model.safetensors")
            shutil.copy(GOLDEN / f"{file}.json", root / file / place / "config.json")
    return root


def test_every_shared_method_has_golden_files() -> None:
    assert {file.partition("-")[0] for file in FILES} == {"llama", "mixtral", "qwen2"}
    assert len(_recipes("llama-float32")) == len(_recipes("llama-bfloat16")) >= 17
    assert {"ties", "sce", "karcher", "passthrough-slices"} <= set(_recipes("mixtral-float32"))


@pytest.mark.parametrize(("file", "name"), CASES, ids=[f"{f}-{n}" for f, n in CASES])
def test_as_mergekit(
    golden: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    file: str,
    name: str,
) -> None:
    dtype, tied = file.partition("-")[2], 0
    recipe = merge_from_dict(recipe_of(name, dtype, golden / file))
    merge(recipe, tmp_path / "out")
    peer = golden / file / f"mergekit-{name}"
    # mergekit leaves the number of layers to a config of its own.
    shutil.copy(tmp_path / "out" / "config.json", peer / "config.json")
    with (
        MergeSources([str(tmp_path / "out"), str(peer)], Path) as results,
        MergeSources(recipe.models, Path) as sources,
    ):
        mine, theirs = results.by_name.values()
        assert set(mine.tensors) == set(theirs.tensors)
        planned = plan_merge(recipe, sources, seed=0)
        for key in mine.tensors:
            first, second = mine.tensors[key].read(), theirs.tensors[key].read()
            if name == "ramplus_tl":
                # mergekit writes float32 whatever dtype was asked for.
                second = second.to(first.dtype)
            assert first.dtype == second.dtype
            if dtype == "float32":
                torch.testing.assert_close(first, second, atol=1e-6, rtol=0, msg=key)
                continue
            undecided, coarse = _tied(planned[key])
            tied += int(undecided.sum())
            equal = (first == second).flatten() | undecided
            if coarse and undecided.any():
                equal |= torch.isclose(first, second, atol=STEP * coarse, rtol=STEP).flatten()
            assert equal.all(), f"{key}: {int((~equal).sum())} of {len(equal)} entries"
    record_property("tied entries", tied)


@pytest.mark.parametrize("file", FILES)
def test_as_many_entries_stay_as_in_mergekit(golden: Path, file: str) -> None:
    """One model, weight 1: what differs from the base is what stayed."""
    with MergeSources([str(golden / file / name) for name in ("base", "a")], Path) as sources:
        base, model = sources.by_name.values()
        peer = load_file(golden / file / "mergekit-ties-one" / "model.safetensors")
        assert set(peer) == set(base.tensors)
        for key, tensor in peer.items():
            moved = int((model.tensors[key].read() != base.tensors[key].read()).sum())
            kept = int((tensor != base.tensors[key].read()).sum())
            assert kept == min(max(1, int(0.4 * tensor.numel())), moved)


def _tied(planned: MergedTensor) -> tuple[Tensor, float]:
    """Entries that equal a threshold of which not all that do can stay, flat.

    The number is not 0 where they also change the coefficients of the whole tensor, as in SCE: it
    is then the largest change that these are multiplied with.
    """
    job = planned.job
    undecided = torch.zeros(torch.Size(job.shape).numel(), dtype=torch.bool)
    for values, cuts in _cuts(planned):
        size = values.float().abs().flatten()
        ordered = size.sort().values
        for cut in cuts:
            if 0 < cut < len(ordered) and ordered[cut - 1] == ordered[cut]:
                undecided |= size == ordered[cut]
    return undecided, float(job.deltas().abs().max()) if planned.method.name == "sce" else 0.0


def _cuts(planned: MergedTensor) -> Iterator[tuple[Tensor, list[int]]]:
    """What competes in a tensor, and the places in ascending order at which it is cut."""
    job, name = planned.job, planned.method.name
    if name == "sce":
        variance = job.deltas().var(dim=0, unbiased=False)
        chosen = int(float(job.options["select_topk"]) * int((variance > 0).sum()))
        yield variance, [variance.numel() - chosen]
    if "density" not in job.per_model:
        return
    for number, delta in enumerate(job.deltas()):
        entries = delta.numel()
        kept = max(1, int(job.per_model["density"][number] * entries))
        gammas = job.per_model.get("gamma", [0.0] * (number + 1))
        bottom = max(0, entries - kept - int(gammas[number] * entries))
        yield delta, [bottom, bottom + kept]
