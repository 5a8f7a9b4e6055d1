import json

import pytest
import torch

from moekit.core.errors import UserError
from moekit.core.spec import spec_from_config
from moekit.core.stats import ExpertStats, Lazy, StatsLayer, merge_all
from moekit.core.stats_table import RATIO_BINS
from tests.models import tiny_config


def make(seed: int, domains: list[str], model_type: str = "qwen3_moe", **settings) -> ExpertStats:
    generator = torch.Generator().manual_seed(seed)
    layers = [StatsLayer(i, f"model.layers.{i}.mlp", 4, 4, 2) for i in range(2)]
    stats = ExpertStats(
        model_type, layers, domains, {"moments": [[1, 0, 0], [1, 1, 0]], **settings}
    )

    def integers(*shape):
        return torch.randint(0, 100, shape, generator=generator)

    for position in range(2):
        stats.held[position, "tokens"] = integers(len(domains))
        stats.held[position, "count"] = integers(len(domains), 4)
        stats.held[position, "moments"] = torch.rand(
            len(domains), 4, 2, generator=generator, dtype=torch.float64
        )
        stats.held[position, "output_max"] = torch.rand(4, generator=generator)
        stats.held[position, "weight_ratio"] = integers(RATIO_BINS)
    stats.held[1, "transitions"] = integers(4, 4)
    stats.held[1, "input_sq"] = torch.rand(4, 8, generator=generator, dtype=torch.float64)
    return stats


def test_saved_stats_open_as_they_were(tmp_path):
    stats = make(0, ["de", "en"])
    stats.metadata = {"data": "x.txt"}
    stats.save(tmp_path / "s")
    again = ExpertStats.open(tmp_path / "s")
    assert (again.model_type, again.layers, again.domains) == (
        stats.model_type,
        stats.layers,
        stats.domains,
    )
    assert (again.settings, again.metadata) == (stats.settings, stats.metadata)
    assert again.held.keys() == stats.held.keys()
    for position, name in stats.held:
        assert torch.equal(again.get(position, name), stats.get(position, name))
    assert isinstance(again.held[1, "input_sq"], Lazy)
    assert not (tmp_path / "s.partial").exists()


def test_reading():
    stats = make(0, ["de", "en"])
    count = stats.held[0, "count"]
    assert torch.equal(stats.counts(0), count.sum(0))
    assert torch.equal(stats.counts(0, "en"), count[1])
    assert torch.equal(
        stats.saliency_sum(0, gate=1, norm=1), stats.held[0, "moments"][..., 1].sum(0)
    )
    assert torch.equal(stats.saliency_sum(0), count.sum(0).double())
    for wrong, message in (
        (lambda: stats.saliency_sum(0, gate=3), r"no sum with exponents \(3, 0, 0\)"),
        (lambda: stats.counts(0, "fr"), "no domain 'fr'"),
        (lambda: stats.get(0, "input_sq"), "profile again"),
        (lambda: stats.get(2, "count"), "layers 0 to 1, not 2"),
        (lambda: stats.get(0, "counts"), "no statistic is called"),
        (lambda: stats.by_domain(0, "output_max"), "not split by domain"),
    ):
        with pytest.raises(UserError, match=message):
            wrong()


def test_unknown_contributions_are_refused_not_zero():
    stats = make(0, ["de"], moments=[[1, 0, 0], [1, 1, 1]])
    stats.held[0, "moments"][..., 1] = float("nan")
    assert stats.saliency_sum(0, gate=1).isfinite().all()
    with pytest.raises(UserError, match="token contributions are not known"):
        stats.saliency_sum(0, 1, 1, 1)


def test_merge_adds_sums_takes_maxima_and_unites_domains(tmp_path):
    first, second = make(0, ["de", "en"]), make(1, ["fr", "de"])
    merged = first.merge(second)
    assert merged.domains == ["de", "en", "fr"]
    for name in ("tokens", "count", "moments"):
        for domain, parts in {
            "de": (first.by_domain(0, name, "de"), second.by_domain(0, name, "de")),
            "en": (first.by_domain(0, name, "en"), 0),
            "fr": (0, second.by_domain(0, name, "fr")),
        }.items():
            assert torch.equal(merged.by_domain(0, name, domain), parts[0] + parts[1])
    assert torch.equal(
        merged.get(0, "output_max"),
        torch.maximum(first.get(0, "output_max"), second.get(0, "output_max")),
    )
    assert torch.equal(
        merged.get(1, "input_sq"), first.get(1, "input_sq") + second.get(1, "input_sq")
    )
    # From files the heavy ones are added only when they are asked for.
    first.save(tmp_path / "1")
    second.save(tmp_path / "2")
    opened = merge_all(ExpertStats.open(tmp_path / name) for name in "12")
    assert isinstance(opened.held[1, "input_sq"], Lazy)
    opened.save(tmp_path / "3")
    for key in merged.held:
        assert torch.equal(ExpertStats.open(tmp_path / "3").get(*key), merged.get(*key))


def test_what_cannot_be_merged():
    stats = make(0, ["de"])
    other = make(0, ["de"])
    del other.held[0, "count"]
    for wrong, message in (
        (make(0, ["de"], "mixtral"), "different models"),
        (make(0, ["de"], kept_share=0.5), "kept_share is None and 0.5"),
        (other, "'count' of model.layers.0.mlp is in one only"),
    ):
        with pytest.raises(UserError, match=message):
            stats.merge(wrong)
    with pytest.raises(UserError, match="no stats"):
        merge_all([])
    with pytest.raises(UserError, match="different statistics"):
        stats.join(make(0, ["de"]))


def test_stats_of_another_model_are_refused():
    stats = make(0, ["de"])
    stats.validate(spec_from_config(tiny_config()))
    for changes, message in (
        ({"num_experts": 8}, "4 experts, top 2 where the model has layer 0, 8 experts, top 2"),
        ({"num_hidden_layers": 3}, "2 MoE layers, the model 3"),
        ({"num_experts_per_tok": 1}, "top 1"),
    ):
        with pytest.raises(UserError, match=message):
            stats.validate(spec_from_config(tiny_config(**changes)))
    with pytest.raises(UserError, match="'mixtral' model, not of 'qwen3_moe'"):
        make(0, ["de"], "mixtral").validate(spec_from_config(tiny_config()))


def test_damaged_files_are_refused(tmp_path):
    def damaged(change):
        make(0, ["de", "en"]).save(tmp_path / "s")
        change(tmp_path / "s")
        with pytest.raises(UserError) as error:
            ExpertStats.open(tmp_path / "s")
        for file in (tmp_path / "s").iterdir():
            file.unlink()
        (tmp_path / "s").rmdir()
        return str(error.value)

    def header(**changes):
        def change(path):
            content = json.loads((path / "stats.json").read_text())
            (path / "stats.json").write_text(json.dumps(content | changes))

        return change

    assert "holds no stats" in damaged(lambda path: (path / "stats.json").unlink())
    assert "cannot be read" in damaged(lambda path: (path / "stats.json").write_text("{"))
    assert "not the header" in damaged(header(format="other"))
    assert "format version 9" in damaged(header(version=9))
    assert "damaged" in damaged(header(layers=[{"index": -1}]))
    assert "no file of stats" in damaged(header(files=["../x.safetensors"]))
    assert "does not fit" in damaged(header(domains=["de"]))
    assert "is missing" in damaged(lambda path: (path / "layer-00001.safetensors").unlink())

    def cut(path):
        file = path / "stats.safetensors"
        file.write_bytes(file.read_bytes()[:-8])

    assert "truncated" in damaged(cut)


def test_saving_where_something_is(tmp_path):
    stats = make(0, ["de"])
    (tmp_path / "s.partial").mkdir()
    (tmp_path / "s.partial" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="no part of stats"):
        stats.save(tmp_path / "s")
    stats.save(tmp_path / "t")
    with pytest.raises(UserError, match="exists already"):
        stats.save(tmp_path / "t")


def test_one_expert_is_read_alone(tmp_path):
    values = torch.arange(24.0, dtype=torch.float64).view(4, 6)
    layer = StatsLayer(0, "layers.0", 4, 4, 2)
    stats = ExpertStats("mixtral", [layer], [""], held={(0, "input_sq"): values})
    assert torch.equal(stats.of_expert(0, "input_sq", 2), values[2])
    stats.save(tmp_path / "stats")
    again = ExpertStats.open(tmp_path / "stats")
    assert torch.equal(again.of_expert(0, "input_sq", 3), values[3])
    assert torch.equal(again.merge(again).of_expert(0, "input_sq", 1), 2 * values[1])
    with pytest.raises(UserError, match="not kept by expert"):
        again.of_expert(0, "count", 0)
    with pytest.raises(UserError, match="profile again"):
        again.of_expert(0, "input_second", 0)
