"""The experts of a model one by one, from memory or from a checkpoint that is not loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moekit.core.architecture import meta_model, read_config
from moekit.core.checkpoint import Checkpoint, read_json
from moekit.core.dequant import dequantize, quantization_of
from moekit.core.expert_source import expert_sources
from moekit.core.expert_weights import ExpertWeights
from moekit.core.layer import MoELayer
from moekit.core.layout import deferred_tensors, to_model
from moekit.core.view import MoEView


@dataclass(frozen=True)
class ModelExperts:
    """`layers` know the activation and the routing rule; `read(position, e)` gives the weights.

    The layers may be on the meta device, without weights of their own.
    """

    layers: Sequence[MoELayer]
    read: Callable[[int, int], ExpertWeights]

    @classmethod
    def of_view(cls, view: MoEView) -> ModelExperts:
        """Those of a loaded model."""
        return cls(view.layers, lambda position, e: view[position].get_expert(e))


@contextmanager
def experts_of(directory: Path) -> Iterator[ModelExperts]:
    """Those of a checkpoint, read when asked for."""
    config = read_config(directory)
    with Checkpoint(directory) as checkpoint:
        stored = deferred_tensors(checkpoint)
        quantization = quantization_of(read_json(directory / "config.json"))
        if quantization is not None:
            stored = dequantize(stored, quantization)
        model = meta_model(config)
        sources = expert_sources(to_model(stored, model).tensors, config)
        yield ModelExperts(MoEView(model).layers, lambda p, e: sources[p].read(e))
