"""The native decoder from Python: the structures of `decoder.h` and calls with arrays.

Shapes: T rows of a step, D width, K choices a row, E experts, V vocabulary.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_double, c_float, c_int32, c_int64, c_void_p
from typing import Any

import numpy as np

from moekit.ops.native.library import Pool
from moekit.ops.native.structures import ExpertFormat, Format

# Positions of a sequence are allocated in multiples of it.
KEY_BLOCK = 64
MAX_HEAD_DIM = 256
MAX_LATENT = 512
# Numbers of which whole ones are stored.
VECTOR = 32
MAX_EXPERTS = 1024
MAX_GROUPS = 64
SCORES = ("softmax", "sigmoid")
STAGES = ("embed", "project", "attend", "output", "route", "experts", "combine", "logits")

ROW = np.dtype([("kv", "u8"), ("capacity", "i8"), ("position", "i4"), ("token", "i4")])


class RouterRule(Structure):
    """From router logits to experts and weights."""

    _fields_ = (
        *((name, c_int32) for name in ("experts", "top_k", "score", "normalize")),
        *((name, c_int32) for name in ("groups", "topk_groups", "group_sums_two")),
        ("bias_on_logits", c_int32),
        *((name, c_float) for name in ("scaling", "logit_scale", "logit_cap", "smallest_sum")),
    )


class Router(Structure):
    """The matrix of a router and its rule."""

    _fields_ = (
        ("rule", RouterRule),
        *((name, c_int32) for name in ("width", "is_bf16")),
        *((name, c_void_p) for name in ("weight", "bias", "correction")),
    )


class Linear(Structure):
    """A matrix and its bias."""

    _fields_ = (("format", POINTER(Format)), ("data", c_void_p), ("bias", c_void_p))


class Layer(Structure):
    """The weights of a decoder layer."""

    _fields_ = (
        *((name, c_void_p) for name in ("before_attention", "after_attention")),
        *((name, c_void_p) for name in ("before_mlp", "after_mlp")),
        *((name, Linear) for name in ("q", "k", "v", "o", "q_a", "kv_a")),
        *((name, POINTER(Linear)) for name in ("k_heads", "v_heads")),
        *((name, c_void_p) for name in ("q_a_norm", "kv_a_norm")),
        *((name, c_void_p) for name in ("q_norm", "k_norm", "sinks", "cos", "sin")),
        *((name, c_int32) for name in ("window", "moe")),
        ("router", Router),
        ("shared_format", POINTER(ExpertFormat)),
        *((name, c_void_p) for name in ("shared", "shared_gate")),
        ("expert_formats", POINTER(POINTER(ExpertFormat))),
    )


class Model(Structure):
    """The sizes of a decoder, and what is not in its layers."""

    _fields_ = (
        *((name, c_int32) for name in ("width", "vocab", "layers", "heads", "kv_heads")),
        *((name, c_int32) for name in ("head_dim", "value_dim", "rotary_half", "rotary_in_pairs")),
        *((name, c_int32) for name in ("q_latent", "kv_latent")),
        *((name, c_int32) for name in ("norm_is_wide", "norm_after_rotation", "kv_is_bf16")),
        *((name, c_int32) for name in ("embedding_is_bf16", "max_rows")),
        *((name, c_float) for name in ("eps", "latent_eps", "attention_scale", "embedding_scale")),
        *((name, c_float) for name in ("residual_scale", "logit_scale", "clip_qkv")),
        *((name, c_void_p) for name in ("embedding", "final_norm")),
        ("head", Linear),
        ("layer", POINTER(Layer)),
    )


class KvShape(Structure):
    """What a sequence keeps of each position.

    With latents there is one key head, of a rotated key of `head_dim` and a latent of `value_dim`.
    """

    _fields_ = (
        *((name, c_int32) for name in ("layers", "kv_heads", "head_dim", "value_dim")),
        *((name, c_int32) for name in ("is_bf16", "is_latent")),
    )

    def nbytes(self, capacity: int) -> int:
        """Bytes of the memory of a sequence with room for `capacity` positions."""
        padded = -(-capacity // KEY_BLOCK) * KEY_BLOCK
        width = self.head_dim + -(-self.value_dim // VECTOR) * VECTOR
        if self.is_latent:
            width = sum(-(-part // VECTOR) * VECTOR for part in (self.head_dim, self.value_dim))
        return self.layers * self.kv_heads * padded * width * (2 if self.is_bf16 else 4)


def kv_shape(pool: Pool, model: Model) -> KvShape:
    """What a sequence of `model` keeps."""
    function = pool.c.decoder_kv
    function.restype, function.argtypes = KvShape, (POINTER(Model),)
    made: KvShape = function(ctypes.byref(model))
    return made


_P, _I = c_void_p, c_int32
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "decoder_new": (_P, (POINTER(Model), _P)),
    "decoder_free": (None, (_P,)),
    "decoder_scratch": (c_int64, (POINTER(Model),)),
    "decoder_rotation": (None, (_P, _I, _P, _P)),
    "decoder_begin": (None, (_P, _P, _I)),
    "decoder_attend": (None, (_P, _I)),
    "decoder_ids": (_P, (_P,)),
    "decoder_weights": (_P, (_P,)),
    "decoder_hidden": (_P, (_P,)),
    "decoder_scores": (_P, (_P,)),
    "decoder_choose": (None, (_P, _I)),
    "decoder_experts": (None, (_P, _I, _P, _P, _I, _P)),
    "decoder_combine": (None, (_P, _I)),
    "decoder_logits": (None, (_P, _P, _I, _P)),
    "decoder_step": (None, (_P, _P, _I, _P, _P, _I, _P)),
    "decoder_router_logits": (None, (_P, _I, _P, _I, _P)),
    "decoder_seconds": (POINTER(c_double), (_P,)),
}


class Decoder:
    """A decoder over weights in memory, which `held` keeps alive; one call at a time.

    Arrays that its methods return are views of what the next step overwrites.
    """

    def __init__(self, pool: Pool, model: Model, held: object) -> None:
        self.c = pool.c
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(self.c, name)
            function.restype, function.argtypes = result, arguments
        self.layers = [model.layer[i] for i in range(model.layers)]
        self.vocab, self.width = model.vocab, model.width
        self.scratch_bytes: int = self.c.decoder_scratch(ctypes.byref(model))
        self._held = (pool, model, held)
        self._handle = self.c.decoder_new(ctypes.byref(model), pool.handle)
        self._rows = 0
        self._closer = weakref.finalize(self, self.c.decoder_free, self._handle)

    def close(self) -> None:
        """Give the scratch memory back."""
        self._closer()

    def rotation(self, layer: int, cos: np.ndarray, sin: np.ndarray) -> None:
        """Take other tables [positions, rotary / 2], which the caller keeps alive."""
        self.c.decoder_rotation(self._handle, layer, cos.ctypes.data, sin.ctypes.data)

    def begin(self, rows: np.ndarray) -> None:
        """Start a step over rows [T] of dtype `ROW`."""
        self._rows = len(rows)
        self.c.decoder_begin(self._handle, rows.ctypes.data, len(rows))

    def attend(self, layer: int) -> None:
        """Attention of a layer, and its router, or all of it where it is no MoE layer."""
        self.c.decoder_attend(self._handle, layer)

    def chosen(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Expert ids and weights, both [T, K]."""
        shape = (self._rows, self.layers[layer].router.rule.top_k)
        ids = _view(self.c.decoder_ids(self._handle), shape, c_int32)
        return ids, _view(self.c.decoder_weights(self._handle), shape, c_float)

    def hidden(self) -> np.ndarray:
        """The hidden states [T, D] that the router saw; overwritten by `combine`."""
        return _view(self.c.decoder_hidden(self._handle), (self._rows, self.width), c_float)

    def scores(self, layer: int) -> np.ndarray:
        """The router's logits [T, E] of a layer that was attended; `choose` goes by what is
        written there."""
        shape = (self._rows, self.layers[layer].router.rule.experts)
        return _view(self.c.decoder_scores(self._handle), shape, c_float)

    def choose(self, layer: int) -> None:
        """Choose the experts of a layer anew."""
        self.c.decoder_choose(self._handle, layer)

    def experts(
        self, layer: int, ids: Sequence[int], addresses: np.ndarray, formats: Any = None
    ) -> None:
        """Apply experts, whose records lie at `addresses` (uint64), to the rows that chose them.

        `formats`, an array of pointers for all experts, takes the place of the layer's own.
        """
        which = np.asarray(ids, np.int32)
        where = np.ascontiguousarray(addresses, np.uint64)
        self.c.decoder_experts(
            self._handle, layer, which.ctypes.data, where.ctypes.data, len(which), formats
        )

    def combine(self, layer: int) -> None:
        """Add the outputs of all chosen experts to the residual stream."""
        self.c.decoder_combine(self._handle, layer)

    def logits(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Logits [n, V] after these rows [n] (int32)."""
        self.c.decoder_logits(self._handle, rows.ctypes.data, len(rows), out.ctypes.data)

    def step(
        self, rows: np.ndarray, addresses: np.ndarray, logit_rows: np.ndarray, out: np.ndarray
    ) -> None:
        """A whole step with every expert in memory: addresses [MoE layers, E] (uint64)."""
        self.c.decoder_step(
            self._handle,
            rows.ctypes.data,
            len(rows),
            addresses.ctypes.data,
            logit_rows.ctypes.data,
            len(logit_rows),
            out.ctypes.data,
        )

    def router_logits(self, layer: int, hidden: np.ndarray) -> np.ndarray:
        """Router logits [T, E] of a MoE layer for hidden states [T, D] (float32)."""
        hidden = np.ascontiguousarray(hidden, np.float32)
        out = np.empty((len(hidden), self.layers[layer].router.rule.experts), np.float32)
        self.c.decoder_router_logits(
            self._handle, layer, hidden.ctypes.data, len(hidden), out.ctypes.data
        )
        return out

    @property
    def seconds(self) -> dict[str, float]:
        """Time spent since the start, by stage."""
        spent = self.c.decoder_seconds(self._handle)
        return {stage: spent[i] for i, stage in enumerate(STAGES)}


def _view(address: int, shape: tuple[int, ...], kind: Any) -> np.ndarray:
    size = int(np.prod(shape))
    return np.ctypeslib.as_array((kind * size).from_address(address)).reshape(shape)
