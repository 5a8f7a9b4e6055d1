"""Factored experts on disk and in memory: what no stock class holds, written and run as factors.

A directory with `factored.json` holds everything but the experts under the names of the model's
parameters, and for each expert and matrix two factors whose product is the matrix (of down: its
transpose): `LAYER.EXPERT.NAME.left` [rows, R], and `.right` [R, D], which a group shares as
`LAYER.gFIRST.NAME.right`. A matrix that factors would not make smaller lies whole, as
`LAYER.EXPERT.NAME`. T tokens, K choices, D width, F expert width, R rank.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from moekit.compress.condense.model_experts import ModelExperts, experts_of
from moekit.compress.factorize.factorizers import Factorizer
from moekit.compress.quantize.layer_experts import gated
from moekit.core.architecture import meta_model, read_config
from moekit.core.checkpoint import Checkpoint, TensorInfo, read_json
from moekit.core.dequant import dequantize, quantization_of
from moekit.core.errors import UserError
from moekit.core.expert_source import bank_names
from moekit.core.find import find_moe
from moekit.core.layer import MoELayer
from moekit.core.layout import deferred_tensors, to_model
from moekit.core.load import FACTORED_FILE, LoadedModel, load_tokenizer
from moekit.core.model_files import side_files
from moekit.core.plan import ExpertPlan
from moekit.core.shards import plan_shards
from moekit.core.skeleton import config_dtype, skeleton
from moekit.core.spec import MoESpec
from moekit.core.view import MoEView
from moekit.core.writer import DEFAULT_SHARD_BYTES, CheckpointWriter
from moekit.profile.experts_run import runs_choices

FORMAT, VERSION = "moekit.factored", 1
STEM = "factored"


def write_factored(
    source: Path,
    out: Path,
    plan: ExpertPlan,
    factorizer: Factorizer,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write the model at `source` to the directory `out` with its experts as factors; the bytes.

    One group of experts is in memory at a time; an interrupted run goes on. Raises `UserError` as
    the writer does, and for families whose experts are no bank of their own.
    """
    config = read_config(source)
    with Checkpoint(source) as checkpoint, experts_of(source) as experts:
        for layer in experts.layers:
            _check_family(layer)
        stored = deferred_tensors(checkpoint)
        quantization = quantization_of(read_json(source / "config.json"))
        if quantization is not None:
            stored = dequantize(stored, quantization)
        model = meta_model(config)
        banks = {full for site in find_moe(model) for _, full in bank_names(site)}
        mapped = to_model(stored, model).tensors
        rest = {name: tensor for name, tensor in mapped.items() if name not in banks}
        parts = _Parts(plan, factorizer, experts)
        shapes = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in rest.items()}
        shapes |= parts.shapes()
        identity = {"factored": str(source.resolve()), "rewrite": dict(factorizer.identity)}
        shards = plan_shards(shapes, DEFAULT_SHARD_BYTES, STEM)
        with CheckpointWriter(out, shapes, identity=identity, shards=shards) as writer:
            for name, first in writer.pending():
                source_tensor = rest.get(name)
                pieces = (
                    parts.pieces(name, first)
                    if source_tensor is None
                    else source_tensor.pieces(first)
                )
                for row, piece in pieces:
                    writer.write_rows(name, row, piece)
                    if progress is not None:
                        progress(writer.written_bytes, writer.total_bytes)
            for name, path in side_files(source)[0].items():
                writer.write_file(name, path.read_bytes())
            writer.write_file("config.json", (source / "config.json").read_text())
            head = {"format": FORMAT, "version": VERSION, "files": writer.shard_files}
            writer.write_file(FACTORED_FILE, json.dumps(head, indent=1) + "\n")
            writer.commit()
        return writer.total_bytes


def load_factored(directory: Path, dtype: str | None = None) -> LoadedModel:
    """The model in `directory`, which computes its experts through their factors.

    Its banks stay empty: whoever asks for an expert's weights gets an error from torch. Raises
    `UserError` for what is no such directory.
    """
    path = directory / FACTORED_FILE
    head = read_json(path) if path.is_file() else {}
    if head.get("format") != FORMAT or head.get("version") != VERSION:
        raise UserError(f"{directory} holds no factored model that this moekit reads.")
    config = read_config(directory)
    number_format = getattr(torch, dtype) if dtype else config_dtype(config) or torch.float32
    model: Any = skeleton(config, number_format)
    tensors = {}
    for name in head["files"]:
        with safe_open(directory / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                tensors[key] = file.get_tensor(key).to(number_format)
    names = set(model.state_dict())
    rest = {name: tensor for name, tensor in tensors.items() if name in names}
    model.load_state_dict(rest, strict=False, assign=True)
    model.tie_weights()
    view = MoEView(model)
    # Held by the model: the seam lets go of a layer whose contexts have all been left.
    model.factored = ExitStack()
    for layer in view:
        own = {
            name.removeprefix(f"{layer.index}."): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"{layer.index}.")
        }
        backend = partial(_run, layer, own)
        model.factored.enter_context(view.use_backend(backend, layers=[layer.position]))
    return LoadedModel(model, load_tokenizer(directory), MoESpec.from_config(config))


class _Parts:
    """The tensors of the experts, group by group, in the order of writing."""

    def __init__(self, plan: ExpertPlan, factorizer: Factorizer, experts: ModelExperts) -> None:
        self._plan, self._factorizer, self._experts = plan, factorizer, experts
        self._held: tuple[tuple[int, int], dict[str, Tensor]] = ((-1, -1), {})
        self._group_of: dict[str, tuple[int, int]] = {}

    def shapes(self) -> dict[str, TensorInfo]:
        """Names and shapes of all tensors; computes every group once."""
        found = {}
        for position, layer in enumerate(self._experts.layers):
            size = self._factorizer.group_size(layer.num_experts)
            for first in range(0, layer.num_experts, size):
                for name, tensor in self._group(position, first).items():
                    found[name] = TensorInfo(tuple(tensor.shape), tensor.dtype)
                    self._group_of[name] = (position, first)
        return found

    def pieces(self, name: str, first: int) -> Iterator[tuple[int, Tensor]]:
        yield first, self._group(*self._group_of[name])[name][first:]

    def _group(self, position: int, first: int) -> dict[str, Tensor]:
        if self._held[0] != (position, first):
            layer = self._experts.layers[position]
            read = partial(self._experts.read, position)
            found = self._factorizer.parts(layer.index, first, read)
            self._held = ((position, first), {f"{layer.index}.{n}": t for n, t in found.items()})
        return self._held[1]


def _run(
    layer: MoELayer,
    parts: Mapping[str, Tensor],
    experts: nn.Module,
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
) -> Tensor:
    """The routed output [T, D], inputs projected once for each group of experts."""
    total = torch.zeros_like(hidden)
    latent: dict[str, Tensor] = {}
    for e in ids.unique().tolist():
        if not 0 <= e < layer.num_experts:
            continue
        token, choice = (ids == e).nonzero(as_tuple=True)
        read = {name: _reading(parts, e, name, hidden, token, latent) for name in ("gate", "up")}
        assert read["up"] is not None
        inner = gated(layer, read["gate"], read["up"])
        whole = parts.get(f"{e}.down")
        if whole is not None:
            out = inner @ whole.T
        else:
            out = inner @ parts[f"{e}.down.left"] @ _right(parts, e, "down")
        bias = parts.get(f"{e}.down_bias")
        out = out if bias is None else out + bias
        total.index_add_(0, token, (out * weights[token, choice, None]).to(total.dtype))
    return total


def _reading(
    parts: Mapping[str, Tensor],
    e: int,
    name: str,
    hidden: Tensor,
    token: Tensor,
    latent: dict[str, Tensor],
) -> Tensor | None:
    """What gate or up gives for the tokens of an expert, [n, F]; None where there is none."""
    bias, whole = parts.get(f"{e}.{name}_bias"), parts.get(f"{e}.{name}")
    if whole is not None:
        return nn.functional.linear(hidden[token], whole, bias)
    left = parts.get(f"{e}.{name}.left")
    if left is None:
        return None
    key = _right_name(parts, e, name)
    if key not in latent:
        latent[key] = hidden @ parts[key].T
    return nn.functional.linear(latent[key][token], left, bias)


def _right(parts: Mapping[str, Tensor], e: int, name: str) -> Tensor:
    return parts[_right_name(parts, e, name)]


def _right_name(parts: Mapping[str, Tensor], e: int, name: str) -> str:
    """The expert's own right factor, or that of the group that begins at or before it."""
    for first in range(e, -1, -1):
        shared = f"g{first}.{name}.right"
        if shared in parts:
            return shared
    raise KeyError(f"expert {e} has no right factor of {name}")


def _check_family(layer: MoELayer) -> None:
    if runs_choices(layer) or getattr(layer.experts, "has_post_expert_norm", False):
        raise UserError(
            f"{layer.name}: {type(layer).__name__} runs its experts by code of its own, so they "
            "cannot be kept as factors; write them expanded."
        )
