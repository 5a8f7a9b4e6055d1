"""`moekit inspect`."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekit.cli.common import JsonOption, NoSeedOption, Output, output

if TYPE_CHECKING:
    from moekit.core.layer_spec import LayerSpec
    from moekit.core.memory import Fit
    from moekit.core.spec import MoESpec

EXPERT_NUMBER = re.compile(r"\.experts\.\d+\.")


def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A local directory, a config.json, a hub id, or babel."
        ),
    ],
    seed: NoSeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Show a model's experts, parameters and memory."""
    with output(as_json) as out:
        from moekit.core.load import find_config

        # Before the heavy imports, so that a wrong path is reported at once.
        config = find_config(model)

        with _without_collection():
            from moekit.core.memory import fit_table, memory_table
            from moekit.core.spec import MoESpec

            spec = MoESpec.from_dir(config)
        stored = _stored(config)
        memory = memory_table(spec.params.parts)
        fits = fit_table(spec.params.parts)
        _print_facts(out, model, spec, stored)
        _print_memory(out, spec, memory)
        _print_fits(out, fits)
        out.result(
            {
                "model": model,
                **spec.to_dict(),
                "total_params": spec.total_params,
                "active_params": spec.active_params,
                "checkpoint": stored,
                "memory": memory,
                "fits": {str(size): [asdict(fit) for fit in row] for size, row in fits.items()},
            }
        )


@contextmanager
def _without_collection() -> Iterator[None]:
    """No garbage collection: imports and a meta model make millions of objects that stay."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _stored(config: Path) -> dict[str, Any] | None:
    """What lies beside the config, or None where a config is all there is."""
    from moekit.core.checkpoint import Checkpoint
    from moekit.core.load import PACKED_FILE

    if config.is_file() or not any(config.glob("*.safetensors*")):
        return None
    if (config / PACKED_FILE).is_file():
        return _packed(config)
    with Checkpoint(config) as checkpoint:
        per_expert = any(EXPERT_NUMBER.search(name) for name in checkpoint.names())
        return {
            "shards": len(checkpoint.files),
            "tensors": len(checkpoint),
            "bytes": checkpoint.nbytes,
            "layout": "per-expert" if per_expert else "fused",
        }


def _packed(directory: Path) -> dict[str, Any]:
    from moekit.runtime.store import ExpertStore

    with ExpertStore.open(directory) as store:
        files = (*store.header.resident_files, *store.header.expert_files)
        codecs = sorted({choice.name for layer in store.layers for choice in layer.codecs})
        records = sum(
            layer.num_planes(e) for layer in store.layers for e in range(layer.num_experts)
        )
        return {
            "shards": len(files),
            "tensors": len(store.header.resident) + records,
            "bytes": sum((directory / name).stat().st_size for name in files),
            "layout": f"packed, {', '.join(codecs)}",
        }


def _print_facts(out: Output, model: str, spec: MoESpec, stored: dict[str, Any] | None) -> None:
    from moekit.core.memory import format_bytes

    out.line(f"{model}: {spec.model_type} ({spec.architecture})")
    rows = [
        ("parameters", f"{count(spec.total_params)} ({spec.total_params:,})"),
        (
            "active",
            f"{count(spec.active_params)} a token, "
            f"{count(spec.params.active_no_embedding)} without embeddings",
        ),
        ("layers", f"{spec.num_layers}, {len(spec.per_layer)} of them MoE"),
        (
            "embeddings",
            f"{spec.vocab_size:,} tokens of width {spec.hidden_size}, "
            + ("tied" if spec.tied_embeddings else "input and output apart"),
        ),
        ("dtype", spec.dtype or "not said"),
    ]
    if spec.quantization is not None:
        rows.append(("quantised", f"natively, {spec.quantization}"))
    if stored is not None:
        size = format_bytes(stored["bytes"])
        rows.append(("checkpoint", f"{size}, {stored['shards']} shards, {stored['layout']} layout"))
    out.table(rows)
    for layers, layer in _alike(spec.per_layer):
        out.line()
        out.line(f"MoE layers {ranges(layers)}")
        out.table([(f"  {name}", text) for name, text in _layer_facts(layer)])


def _layer_facts(layer: LayerSpec) -> list[tuple[str, str]]:
    shared = f"{layer.num_shared_experts}, width {layer.shared_width}"
    null = f", {layer.num_null_experts} more without weights" if layer.num_null_experts else ""
    rule = [layer.score, {True: "normalised", False: "not normalised", None: ""}[layer.normalize]]
    if layer.selection != "topk":
        rule.append(f"chosen by {layer.selection}")
    if layer.scaling != 1:
        rule.append(f"times {layer.scaling:g}")
    if layer.num_groups > 1:
        rule.append(f"from {layer.topk_groups} of {layer.num_groups} groups")
    if layer.has_correction_bias:
        rule.append(f"correction bias on {layer.bias_on or 'the choice'}")
    storage = {
        "fused": layer.fused,
        "transposed": layer.transposed,
        "interleaved": layer.interleaved,
        "with biases": layer.has_bias,
        "without gate": not layer.has_gate,
    }
    return [
        ("experts", f"{layer.num_experts}, top-{layer.top_k}, width {layer.expert_width}{null}"),
        ("one expert", f"{count(layer.params_per_expert)} parameters"),
        ("shared", shared if layer.num_shared_experts else "none"),
        ("router", ", ".join(part for part in rule if part)),
        ("in memory", ", ".join(name for name, true in storage.items() if true) or "plain"),
    ]


def _print_memory(out: Output, spec: MoESpec, memory: dict[str, dict[int, int]]) -> None:
    from moekit.core.memory import BIT_WIDTHS, format_bytes

    parameters = {**spec.params.parts, "total": spec.total_params}
    out.line()
    out.table(
        [
            (part, count(parameters[part]), *(format_bytes(row[bits]) for bits in BIT_WIDTHS))
            for part, row in memory.items()
        ],
        header=("part", "params", *(f"{bits} bit" for bits in BIT_WIDTHS)),
    )


def _print_fits(out: Output, fits: dict[int, list[Fit]]) -> None:
    from moekit.core.memory import BIT_WIDTHS

    out.line()
    out.line("What fits, with a tenth kept free for activations and the key-value cache:")
    out.table(
        [(f"{size} GB", *(_fit(fit) for fit in row)) for size, row in fits.items()],
        header=("memory", *(f"{bits} bit" for bits in BIT_WIDTHS)),
    )


def _fit(fit: Fit) -> str:
    if fit.whole:
        return "all"
    return f"{fit.expert_fraction:.0%} of experts" if fit.resident else "no"


def _alike(layers: Iterable[LayerSpec]) -> list[tuple[list[int], LayerSpec]]:
    """Layers that differ in nothing but their place, together, in order of first appearance."""
    groups: dict[LayerSpec, list[int]] = {}
    for layer in layers:
        groups.setdefault(replace(layer, layer_index=0, path=""), []).append(layer.layer_index)
    return [(indices, layer) for layer, indices in groups.items()]


def ranges(numbers: list[int]) -> str:
    """`[0, 1, 2, 5]` as "0-2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def count(number: int) -> str:
    """A number of parameters in three digits: 671B, 37.6B, 22.1M, 512."""
    value, units = float(number), ["T", "B", "M", "k", ""]
    while abs(value) >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop()
    return f"{value:.3g}{units[-1]}"
