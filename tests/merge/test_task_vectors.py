"""The task-vector kernel: identities of the methods, and blocks that change nothing."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from moekit.core.seeds import generator
from moekit.merge import magnitude
from moekit.merge.catalogue import merge_methods
from moekit.merge.consensus import Consensus
from moekit.merge.job import BLOCK_ELEMENTS, TensorJob
from moekit.merge.magnitude import largest
from moekit.merge.methods import TASK_VECTORS
from moekit.merge.sparsify import Density, rule_for, sparsified
from moekit.merge.task_vectors import Part, merge_rows
from moekit.merge.whole_model import majority_sign, whole_model_rules

N, ROWS, COLUMNS = 3, 24, 16


def models(dtype: torch.dtype = torch.float32, count: int = N) -> tuple[Tensor, list[Tensor]]:
    draw = torch.Generator().manual_seed(5)
    base = torch.randn(ROWS, COLUMNS, generator=draw).to(dtype)
    moved = [
        (base + 0.1 * torch.randn(ROWS, COLUMNS, generator=draw)).to(dtype) for _ in range(count)
    ]
    return base, moved


def keyed(number: int) -> torch.Generator:
    return generator(0, f"model {number}")


def run(
    name: str,
    base: Tensor,
    tensors: list[Tensor],
    dialect: str = "mergekit",
    dtype: torch.dtype = torch.float32,
    **given: object,
) -> Tensor:
    method = merge_methods(dialect)[name]
    per_model = {k: [given.get(k, d)] * len(tensors) for k, d in method.per_model.items()}
    for key, values in per_model.items():
        if isinstance(values[0], list):
            per_model[key] = values[0]
    options = {k: given.get(k, d) for k, d in method.options.items()}
    job = TensorJob("layers.0.w", base, tensors, per_model, options, dtype, keyed)
    return torch.cat([block.reshape(-1, *base.shape[1:]) for _, block in method.run(job)])


def test_task_arithmetic_by_equal_shares_is_the_average() -> None:
    base, tensors = models()
    merged = run("task_arithmetic", base, tensors, weight=1 / N)
    torch.testing.assert_close(merged, torch.stack(tensors).mean(0), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", TASK_VECTORS)
@pytest.mark.parametrize("dialect", ["mergekit", "paper"])
def test_one_model_kept_whole_is_itself(name: str, dialect: str) -> None:
    base, tensors = models(count=1)
    merged = run(name, base, tensors, dialect, weight=1.0, density=1.0)
    # (W - W0) + W0 rounds once.
    torch.testing.assert_close(merged, tensors[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["dare_linear", "della_linear", "breadcrumbs"])
def test_keeping_everything_is_task_arithmetic(name: str) -> None:
    base, tensors = models()
    plain = run("task_arithmetic", base, tensors, weight=0.3)
    assert torch.equal(run(name, base, tensors, weight=0.3, density=1.0), plain)


@pytest.mark.parametrize("limit", [0, 2**27], ids=["counted", "held"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_exactly_the_largest_stay(monkeypatch, dtype: torch.dtype, limit: int) -> None:
    monkeypatch.setattr(magnitude, "SORTED_ENTRIES", limit)
    values = models(dtype)[0] - models(dtype)[1][0]
    # bf16 magnitudes repeat, so that the threshold is tied.
    for count in (1, 7, 100, values.numel()):
        keep = largest(lambda: iter([values[:10], values[10:]]), count, values.numel())
        mask = torch.cat([keep.keep(values[:10]), keep.keep(values[10:])])
        assert int(mask.sum()) == count
        if count < values.numel():
            assert values[mask].abs().min() >= values[~mask].abs().max()


@pytest.mark.parametrize("name", TASK_VECTORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_blocks_do_not_change_the_result(name: str, dtype: torch.dtype) -> None:
    base, tensors = models(dtype)
    settings = TASK_VECTORS[name][0]
    share = Density(0.5, 0.2, 0.05)
    parts = [Part(tensor, 0.4, share) for tensor in tensors]

    def merged(block_rows: int) -> Tensor:
        rows = merge_rows(settings, base, parts, generator=keyed, block_rows=block_rows)
        return torch.cat([block for _, block in rows])

    whole = merged(ROWS)
    for block_rows in (1, 5):
        assert torch.equal(merged(block_rows), whole)


def test_the_zero_sign_tells_the_dialects_apart() -> None:
    # Votes of the first entry cancel; elsewhere most of the model is negative.
    base = torch.zeros(1, 4)
    tensors = [torch.tensor([[1.0, -1, -1, -1]]), torch.tensor([[-1.0, -1, -1, -1]])]
    settings = TASK_VECTORS["ties"][1]
    parts = [Part(tensor, 1.0, Density(1.0)) for tensor in tensors]
    for sign, expected in ((1, 1.0), (-1, -1.0)):
        rows = merge_rows(settings, base, parts, generator=keyed, block_rows=1, zero_sign=sign)
        assert torch.equal(next(rows)[1], torch.tensor([[expected, -1, -1, -1]]))


@pytest.mark.parametrize(
    ("rule", "rescale"), [("random", "inverse"), ("magprune", "inverse")], ids=["dare", "della"]
)
def test_what_is_drawn_keeps_the_expectation(rule: str, rescale: str) -> None:
    values = models()[0][:4]
    draws = 4000
    total = torch.zeros_like(values)
    for seed in range(draws):
        one = rule_for(rule, Density(0.5, 0.2), values.numel(), lambda s=seed: generator(s, "draw"))
        total += next(sparsified(one, lambda: iter([values]), rescale))
    # Five standard deviations of a mean of draws whose probability is at least 0.3.
    bound = 5 * values.abs() * ((1 / 0.3 - 1) / draws) ** 0.5
    assert bool(((total / draws - values).abs() <= bound).all())


def test_rescaling_by_l1_keeps_the_sum_of_magnitudes() -> None:
    values = models()[0]
    rule = rule_for("random", Density(0.3), values.numel(), lambda: generator(1, "draw"))
    kept = next(sparsified(rule, lambda: iter([values]), "l1"))
    assert float(kept.abs().sum()) == pytest.approx(float(values.abs().sum()), rel=1e-5)
    assert 0 < int((kept == 0).sum()) < values.numel()


def test_breadcrumbs_without_outliers_keeps_the_rest() -> None:
    """mergekit's empty slice takes everything away here; this does not."""
    base, tensors = models(count=1)
    merged = run("breadcrumbs", base, tensors, weight=1.0, density=0.5, gamma=0.0)
    changed = (merged != base).sum()
    assert int(changed) == base.numel() // 2


def test_order_of_models_matters_to_rounding_only() -> None:
    base, tensors = models()
    for name in ("ties", "breadcrumbs_ties", "task_arithmetic"):
        given = {"density": 0.5} if name != "task_arithmetic" else {}
        one = run(name, base, tensors, weight=[0.2, 0.3, 0.5], **given)
        other = run(name, base, tensors[::-1], weight=[0.5, 0.3, 0.2], **given)
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_a_large_tensor_goes_through_in_several_blocks() -> None:
    base = torch.zeros(3, BLOCK_ELEMENTS)
    job = TensorJob("w", base, [base + 1], {"weight": [1.0]}, {}, torch.float32, keyed)
    assert list(job.spans()) == [(0, 1), (1, 2), (2, 3)]


def test_the_whole_model_competes_as_published() -> None:
    """Against the published form on flat vectors: two tensors of different scale are one."""
    draw = torch.Generator().manual_seed(3)
    shapes = [(6, 8), (5, 4)]
    sized = list(zip(shapes, (1.0, 0.1), strict=True))
    tensors = [
        [scale * torch.randn(*shape, generator=draw) for shape, scale in sized] for _ in range(N)
    ]
    method = merge_methods("paper")["ties"]
    jobs = []
    for place, shape in enumerate(shapes):
        given = {"weight": [1.0] * N, "density": [0.2] * N}
        own = [model[place] for model in tensors]
        options = dict(method.options)
        job = TensorJob(str(place), torch.zeros(shape), own, given, options, torch.float32, keyed)
        jobs.append(job)
    rules = whole_model_rules(jobs, [0.2] * N)
    sign = majority_sign(jobs, rules, [1.0] * N, Consensus())
    merged = []
    for job in jobs:
        options = {**job.options, "thresholds": rules, "zero_sign": sign}
        rows = method.run(dataclasses.replace(job, options=options))
        merged.append(torch.cat([block for _, block in rows]).flatten())

    flat = torch.stack([torch.cat([part.flatten() for part in model]) for model in tensors])
    entries = flat.shape[1]
    bound = flat.abs().kthvalue(entries - int(entries * 0.2), dim=1, keepdim=True).values
    trimmed = flat * (flat.abs() >= bound)
    assert (trimmed != 0).sum(1).tolist() == [int(entries * 0.2) + 1] * N
    elected = trimmed.sum(0).sign()
    elected[elected == 0] = elected.sum().sign()
    agreeing = trimmed * (trimmed.sign() == elected)
    expected = agreeing.sum(0) / (agreeing != 0).sum(0).clamp(min=1)
    torch.testing.assert_close(torch.cat(merged), expected)
