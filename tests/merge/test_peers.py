"""The authors' and FusionBench's functions, by files that `benchmarks/merge_peers.py` wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.merge_peers import GOLDEN, MODELS, OFF_DIAGONAL, flat, information, moments
from moekit.merge.catalogue import merge_methods
from moekit.merge.competition import pcb
from moekit.merge.job import TensorJob
from moekit.merge.recipe import merge_from_dict
from moekit.merge.run import merge

# Sums in another order.
CLOSE = {"atol": 2e-6, "rtol": 0}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("peers")
    states: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(GOLDEN / "llama-float32.safetensors").items():
        side, model, name = key.split("/")
        if side == "in":
            states.setdefault(model, {})[name] = tensor
    for model, state in states.items():
        (root / model).mkdir()
        save_file(state, root / model / "model.safetensors")
        shutil.copy(GOLDEN / "llama-float32.json", root / model / "config.json")
    return root


def expected(peer: str) -> dict[str, Tensor]:
    found = load_file(GOLDEN.parent / "peers.safetensors")
    return {k.partition("/")[2]: v for k, v in found.items() if k.startswith(f"{peer}/")}


def state(root: Path, model: str) -> dict[str, Tensor]:
    return load_file(root / model / "model.safetensors")


def merged(root: Path, out: Path, method: str, **parameters: object) -> dict[str, Tensor]:
    recipe = {
        "merge_method": method,
        "dialect": "paper",
        "base_model": str(root / "base"),
        "models": [{"model": str(root / model)} for model in MODELS],
        "parameters": parameters,
    }
    merge(merge_from_dict(json.loads(json.dumps(recipe))), out)
    return state(out.parent, out.name)


@pytest.mark.parametrize(("peer", "given"), [("ties", {"density": 0.2}), ("tsv_m", {})])
def test_task_vectors_as_fusion_bench(models, tmp_path, peer, given) -> None:
    found, base = merged(models, tmp_path / "out", peer, **given), state(models, "base")
    for name, delta in expected(peer).items():
        torch.testing.assert_close(found[name] - base[name], delta, **CLOSE, msg=name)


def test_widen_as_its_authors(models, tmp_path) -> None:
    found, theirs = merged(models, tmp_path / "out", "widen"), expected("widen")
    assert set(found) == set(theirs)
    for name, tensor in theirs.items():
        torch.testing.assert_close(found[name], tensor, **CLOSE, msg=name)


def test_pcb_as_its_authors(models) -> None:
    base = state(models, "base")
    tuned = [state(models, model) for model in MODELS]
    rows = flat([{name: one[name] - base[name] for name in base} for one in tuned])
    theirs = torch.cat([tensor.flatten() for _, tensor in sorted(expected("pcb").items())])
    torch.testing.assert_close(pcb(rows, 0.1, 1.0, inter="raw"), theirs, **CLOSE)


def job(models: Path, name: str, method: str, statistics: list[Tensor], **options: object):
    made = merge_methods("paper")[method]
    return made, TensorJob(
        name,
        None,
        [state(models, model)[name] for model in MODELS],
        {"weight": [1.0] * 3},
        {**made.options, **options},
        torch.float32,
        lambda number: torch.Generator(),
        statistics=[_Stored(value) for value in statistics],
    )


class _Stored:
    """A statistic as it is read from disk."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self.ndim = tensor, tensor.ndim

    def read(self) -> Tensor:
        return self._tensor

    def rows(self, start: int, stop: int) -> Tensor:
        return self._tensor[start:stop]


def test_fisher_as_fusion_bench_on_one_information(models) -> None:
    base = state(models, "base")
    known = [{n: information(n, tuple(t.shape), i) for n, t in base.items()} for i in range(3)]
    norms = [float(torch.cat([t.flatten() for t in one.values()]).norm()) for one in known]
    for name, theirs in expected("fisher").items():
        stats = [one[name] for one in known]
        method, given = job(models, name, "fisher", stats, norms=norms)
        found = torch.cat([rows for _, rows in method.run(given)])
        # They add 1e-6 to an information of 0.01 to 1, where the paper takes a maximum.
        torch.testing.assert_close(found, theirs, atol=5e-5, rtol=0, msg=name)


def test_regmean_as_fusion_bench(models) -> None:
    for name, theirs in expected("regmean").items():
        if theirs.ndim < 2 or "embed" in name:
            continue
        stats = [moments(name, theirs.shape[1], i) for i in range(3)]
        given = {"transposed": False, "scale": OFF_DIAGONAL, "ridge": 1e-12}
        method, one = job(models, name, "regmean", stats, **given)
        found = torch.cat([rows for _, rows in method.run(one)])
        # An inverse in float32 there, a solve in float64 here.
        torch.testing.assert_close(found, theirs, atol=1e-5, rtol=0, msg=name)


def test_the_port_of_fisher_is_no_fisher_information() -> None:
    """What FusionBench squares is one gradient of a sum: it has products of labels and examples."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 5, generator=draw, requires_grad=True)
    inputs = torch.randn(8, 5, generator=draw)
    exact = torch.zeros(4, 5)
    for row in inputs:
        log = (row @ weight.T).log_softmax(-1)
        for label in range(4):
            (gradient,) = torch.autograd.grad(log[label], weight, retain_graph=True)
            exact += log[label].detach().exp() * gradient.square() / len(inputs)
    log = (inputs @ weight.T).log_softmax(-1)
    (port,) = torch.autograd.grad((log.exp().detach().sqrt() * log).sum(), weight)
    both = torch.stack([exact.flatten(), port.square().flatten()])
    assert float(torch.corrcoef(both)[0, 1]) < 0.9
