"""Every registered converter: it runs, what it says of step 0 holds, and its result loads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from moekit.core.load import load_language_model
from moekit.core.record import RunRecord
from moekit.core.registry import registry
from moekit.core.stats import ExpertStats, StatsLayer
from moekit.upcycle.converter import KIND
from moekit.upcycle.run import Request, upcycle
from tests.families.tiny import build_tiny
from tests.models import tiny_tokenizer


@dataclass
class Case:
    """What a method is tried on: a source by name, other models, options, whether it reads."""

    source: str = "base"
    others: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    data: bool = False
    stats: bool = False


TUNED, FFNS = ("code", "prose"), ("ffn-code", "ffn-prose")
CASES = {
    "dense-to-moe": Case(options={"experts": 4}),
    "sparse": Case(options={"experts": 4}),
    "drop": Case(options={"experts": 4}),
    "virtual-groups": Case(options={"experts": 6, "top_k": 3, "slices": 3}),
    "dynamic-dino": Case(options={"experts": 8}),
    "deepseek-moe": Case(options={"experts": 4, "top_k": 2, "slices": 2, "shared": 1 / 3}),
    "shared-copy": Case(options={"experts": 4}),
    "split": Case(options={"experts": 6, "top_k": 3, "slices": 6}),
    "moe-tuning": Case(),
    "models-to-moe": Case(others=TUNED),
    "btx": Case(others=TUNED),
    "mergekit-moe": Case(others=TUNED, data=True),
    "expert-upcycling": Case("moe"),
    "moe-to-dense": Case("moe"),
    "average": Case("moe"),
    "frequency-average": Case("moe", stats=True),
    "side-by-side": Case("moe"),
    "bam": Case(others=TUNED),
    "bam-shared-kv": Case(others=TUNED),
    "branch-train-merge": Case(others=TUNED),
    "branch-train-average": Case(others=TUNED, options={"sequences": 2}, data=True),
    "flexmore": Case(others=FFNS, options={"ranks": 4}),
    "twin-merging": Case(others=TUNED, options={"epochs": 1, "examples": 2}, data=True),
    "expand-residues": Case("flexmore"),
    "fold-residues": Case("twin-merging", options={"expert": "code"}),
    "mote": Case(options={"experts": 2}),
    "pack-ternary": Case("mote"),
    "read-me": Case(options={"router_steps": 2, "router_width": 16}, data=True),
}
METHODS = [method.name for method in registry.methods(kind=KIND)]


@pytest.fixture(scope="module")
def made(family_of_models, tmp_path_factory):
    """The result of a method on its tiny case, made once, with what was said and measured."""
    root, results = tmp_path_factory.mktemp("made"), {}

    def source(name):
        if name in CASES:
            return of(name)[0]
        if name == "moe":
            return moe(root / "moe")
        return family_of_models[name]

    def of(name):
        if name not in results:
            case = CASES[name]
            texts = (str(family_of_models["texts"]),) if case.data else ()
            others = tuple(str(family_of_models[other]) for other in case.others)
            base = str(source(case.source))
            request = Request(name, base, others, case.options, data=texts)
            stats = write_stats(root / "stats") if case.stats else None
            results[name] = (root / name, upcycle(request, root / name, stats=stats))
        return results[name]

    return of


def moe(path):
    if not path.exists():
        config = build_tiny("qwen3_moe").config
        config.vocab_size, config.norm_topk_prob = 320, True
        build_tiny("qwen3_moe", config=config).save_pretrained(path)
        tiny_tokenizer().save_pretrained(path)
    return path


def write_stats(path):
    layers = [StatsLayer(index, f"{index}", 8, 8, 2) for index in moe_layers()]
    stats = ExpertStats("qwen3_moe", layers, ["all"], settings={"moments": [(1, 0, 0)]})
    for position in range(len(layers)):
        stats.held[position, "count"] = torch.arange(8)[None]
        stats.held[position, "moments"] = torch.ones(1, 8, 1, dtype=torch.float64)
        stats.held[position, "tokens"] = torch.tensor([14])
    stats.save(path)
    return path


def moe_layers() -> list[int]:
    layers = build_tiny("qwen3_moe").model.layers
    return [index for index, layer in enumerate(layers) if hasattr(layer.mlp, "experts")]


def test_every_converter_has_a_case():
    assert sorted(METHODS) == sorted(CASES)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_said_of_step_0_is_measured_and_holds(made, name):
    out, result = made(name)
    start = result.start
    assert start.why[0].islower()
    assert start.text.startswith("At step 0")
    if start.equal_to is None:
        assert start.tolerance is None
    else:
        assert result.measured is not None
        assert result.measured <= start.tolerance
    record = RunRecord.load(out)
    assert record.metrics["start"]["why"] == start.why
    assert start.why.split(",")[0] in (out / "README.md").read_text()


@pytest.mark.parametrize("name", METHODS)
def test_the_result_loads_and_generates(made, name):
    out, _ = made(name)
    model = load_language_model(out, "float32").model
    tokens = torch.tensor([[5, 70, 131, 9]])
    assert model.generate(tokens, max_new_tokens=2, do_sample=False).shape == (1, 6)


@pytest.mark.parametrize("name", METHODS)
def test_what_the_registry_tells(name):
    method = registry.find(name, kind=KIND)
    assert method.title[0].isupper()
    assert "weights" in method.needs
    assert all(option.help for option in method.options)
    # Kernels have no paper of their own; their settings do.
    kernels = {m.target for m in registry.methods(kind=KIND) if m.settings}
    assert method.paper or method.target in kernels or method.name.endswith(("residues", "ternary"))
