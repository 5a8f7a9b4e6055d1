"""The resident part of a packed model as the native decoder reads it."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from ctypes import POINTER
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moekit.core.checkpoint import TensorInfo
from moekit.core.packed import PackedLayer
from moekit.core.packed_resident import decoded, matrix_arrays
from moekit.ops.codecs import Codec, Part
from moekit.ops.native import ExpertFormat, Format, Pool
from moekit.ops.native.decoder import SCORES, Layer, Linear, Model, Router, RouterRule
from moekit.ops.native.encode import encode_in_memory, nbytes_in_memory
from moekit.ops.native.formats import KINDS, expert_format, matrix_format, plain_format
from moekit.runtime.decoder_shape import DecoderShape, LayerShape, NotSupportedError, RouterShape
from moekit.runtime.expert_formats import formats_of_layer
from moekit.runtime.latent_heads import LatentHeads
from moekit.runtime.pages import Arena
from moekit.runtime.rows_on_disk import RowsOnDisk
from moekit.runtime.store import ExpertStore, StoreError
from moekit.runtime.tensor_roles import HEADS, MATRIX, TABLE, VECTOR, roles_of

_OFFSETS = ("codes", "scale", "zero")


@dataclass(frozen=True)
class Matrix:
    """A matrix in memory, in a format of the kernels."""

    format: Format
    memory: Tensor

    @property
    def address(self) -> int:
        return self.memory.data_ptr()


class DecoderWeights:
    """Reads the resident part of `store` and describes it in `model`, which points into it.

    Matrices of attention, of dense and shared MLPs and the output head are encoded by `codec`, or
    kept in `dtype` (None: as stored); embedding and routers stay as stored, all else is float32.
    What is stored encoded stays so, whatever `codec` is. Where nothing is to be encoded, all of it
    stays where it was read. With `embedding_on_disk` its rows are in `rows`, unless the output head
    is tied to it. Raises StoreError for a damaged or incomplete part.
    """

    def __init__(
        self,
        shape: DecoderShape,
        store: ExpertStore,
        pool: Pool,
        *,
        codec: Codec | None = None,
        dtype: torch.dtype | None = None,
        kv_bf16: bool = False,
        max_rows: int = 256,
        embedding_on_disk: bool = False,
    ) -> None:
        self.shape = shape
        self._pool, self._dtype = pool, dtype
        self._encoded = store.header.encoded
        self._codec = codec if self._encoded is None else self._encoded.codec.make()
        self._matrices: dict[str, Matrix] = {}
        self._tensors: dict[str, Tensor] = {}
        self._heads: dict[str, LatentHeads] = {}
        self._formats: list[Any] = []
        self._roles = roles_of(shape)
        infos = store.resident_info()
        self.rows: RowsOnDisk | None = None
        if embedding_on_disk and self._roles[shape.embedding] == (TABLE,):
            self.rows = self._embedding(store, infos, max_rows)
        works = [name for name, info in infos.items() if self._needs_work(name, info.dtype)]
        self._whole = self._encoded is not None or not works
        copied = works if self._whole else infos
        self._arena = Arena(sum(self._size(name, infos[name].dtype) for name in copied))
        self._read(store)
        self.layers = (Layer * len(shape.layers))(
            *[self._layer(layer, store) for layer in shape.layers]
        )
        self.model = self._model(kv_bf16, max_rows)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights in memory."""
        tensors = [*(m.memory for m in self._matrices.values()), *self._tensors.values()]
        tensors += [tensor for h in self._heads.values() for tensor in (h.keys, h.values)]
        memory = [tensor.untyped_storage() for tensor in tensors]
        beside = 0 if self.rows is None else self.rows.nbytes - self.rows.table.nbytes
        return sum({held.data_ptr(): held.nbytes() for held in memory}.values()) + beside

    def kernel_scratch(self, rows: int) -> int:
        """Bytes that the kernels take, at most, for the activations of a step of `rows` rows."""
        shape = self.shape
        layers = [layer.router.spec for layer in shape.layers if layer.router is not None]
        wide = max((spec.expert_width for spec in layers), default=0)
        pairs = rows * (1 + max((spec.top_k for spec in layers), default=0))
        dense = [shape.tensors[f"{x.mlp[0]}.weight"][0] for x in shape.layers if x.mlp is not None]
        numbers = pairs * (2 * wide + shape.width) + rows * 2 * max(dense, default=0)
        # Two numbers of each group of 32 columns besides.
        return 4 * (numbers + numbers // 16 + rows * shape.heads * shape.value_dim)

    def _read(self, store: ExpertStore) -> None:
        roles = dict(self._roles)
        names = set(store.resident_info())
        if self.rows is not None:
            names.discard(self.shape.embedding)
            del roles[self.shape.embedding]
        for name, stored in store.resident_stored(whole=self._whole, names=names):
            wanted, part = self.shape.tensors.get(name), self._encoded_part(name)
            if wanted != tuple(stored.shape if part is None else part.shape):
                raise StoreError(
                    f"{store.path}: tensor {name} {list(stored.shape)} has no place in the model "
                    "of its config.json. Convert the model again."
                )
            given = roles.pop(name, ())
            if part is not None and given == (MATRIX,):
                self._matrices[name] = self._stored_matrix(part, stored.reshape(-1))
                continue
            if part is not None and self._encoded is not None:
                stored = decoded(self._encoded, name, stored)
            if TABLE in given:
                self._tensors[name] = _aligned(stored.to(_table_dtype(stored.dtype)))
            if VECTOR in given:
                self._tensors[name] = stored.to(torch.float32, copy=True)
            if HEADS in given:
                heads, kept = self.shape.heads, self._kept(stored.dtype)
                self._heads[name] = LatentHeads.of(stored, heads, self.shape.value_dim, kept)
            if MATRIX in given:
                self._matrices[name] = self._matrix(name, stored)
        if roles:
            raise StoreError(
                f"{store.path}: tensor {min(roles)} is missing. Convert the model again."
            )

    def _embedding(
        self, store: ExpertStore, infos: Mapping[str, TensorInfo], most: int
    ) -> RowsOnDisk | None:
        """The embedding left on disk, where its rows are read as they are stored."""
        name = self.shape.embedding
        info = infos.get(name)
        expected = self.shape.tensors[name]
        if info is None or (info.shape, _table_dtype(info.dtype)) != (expected, info.dtype):
            return None
        rows = RowsOnDisk(store, name, most)
        self._tensors[name] = rows.table
        return rows

    def _encoded_part(self, name: str) -> Part | None:
        return None if self._encoded is None else self._encoded.matrices.get(name)

    def _stored_matrix(self, part: Part, stored: Tensor) -> Matrix:
        """A matrix that is stored as the kernels read it."""
        assert self._encoded is not None
        shape = (part.shape[0], part.shape[1])
        planes, _ = matrix_arrays(self._encoded.codec, shape)
        offsets = [{array.part.name: array.offset for array in plane} for plane in planes]
        format = matrix_format(self._encoded.codec.make(), shape, offsets)
        if format is None:
            raise NotSupportedError(f"the kernels do not read {self._encoded.codec.name}")
        return Matrix(format, _aligned(stored))

    def _needs_work(self, name: str, stored: torch.dtype) -> bool:
        """Whether a tensor holds a matrix that is not read as it is stored."""
        if HEADS in self._roles.get(name, ()):
            return True
        if MATRIX not in self._roles.get(name, ()) or self._is_shared(name, stored):
            return False
        if self._encoded_part(name) is not None:
            return self._roles[name] != (MATRIX,)
        return encodes(self._codec, self.shape.tensors[name]) or self._kept(stored) != stored

    def _size(self, name: str, stored: torch.dtype) -> int:
        """Bytes of the arena that a tensor takes."""
        if MATRIX not in self._roles.get(name, ()) or self._is_shared(name, stored):
            return 0
        outputs, inputs = self.shape.tensors[name]
        if encodes(self._codec, (outputs, inputs)):
            assert self._codec is not None
            return nbytes_in_memory(self._codec, (outputs, inputs))
        return Arena.padded(outputs * inputs * self._kept(stored).itemsize)

    def _is_shared(self, name: str, stored: torch.dtype) -> bool:
        """Whether a matrix is read where the embedding that it is tied to lies."""
        encoded = encodes(self._codec, self.shape.tensors[name])
        return (
            TABLE in self._roles[name]
            and not encoded
            and _table_dtype(stored) == self._kept(stored)
        )

    def _kept(self, stored: torch.dtype) -> torch.dtype:
        return self._dtype or (stored if stored in KINDS else torch.float32)

    def _matrix(self, name: str, tensor: Tensor) -> Matrix:
        shape = (tensor.shape[0], tensor.shape[1])
        if self._is_shared(name, tensor.dtype):
            kept = self._tensors[name]
            return Matrix(plain_format(shape, kept.dtype), kept)
        if self._whole and not self._needs_work(name, tensor.dtype):
            return Matrix(plain_format(shape, tensor.dtype), _aligned(tensor))
        memory = self._arena.take(self._size(name, tensor.dtype))
        if encodes(self._codec, shape):
            assert self._codec is not None
            weight = tensor if tensor.dtype in KINDS else tensor.float()
            return Matrix(encode_in_memory(self._pool, self._codec, weight, memory), memory)
        dtype = self._kept(tensor.dtype)
        kept = memory[: tensor.numel() * dtype.itemsize].view(dtype).view(shape).copy_(tensor)
        return Matrix(plain_format(shape, dtype), kept)

    def _model(self, kv_bf16: bool, max_rows: int) -> Model:
        shape, family = self.shape, self.shape.family
        half = next(iter(shape.angles(1).values()))[0].shape[-1]
        embedding = self._tensors[shape.embedding]
        return Model(
            width=shape.width,
            vocab=shape.vocab,
            layers=len(shape.layers),
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            value_dim=shape.value_dim,
            q_latent=shape.q_latent,
            kv_latent=shape.kv_latent,
            latent_eps=shape.latent_eps,
            rotary_half=half,
            rotary_in_pairs=shape.in_pairs,
            norm_is_wide=shape.norm_is_wide,
            norm_after_rotation=family.norm_after_rotation,
            kv_is_bf16=kv_bf16,
            embedding_is_bf16=embedding.dtype == torch.bfloat16,
            max_rows=max_rows,
            eps=shape.eps,
            attention_scale=shape.attention_scale,
            embedding_scale=shape.number(family.embedding_scale, 1.0),
            residual_scale=shape.number(family.residual_scale, 1.0),
            logit_scale=1.0 / shape.number(family.logit_divisor, 1.0),
            clip_qkv=shape.number(family.clip, 0.0),
            embedding=embedding.data_ptr(),
            final_norm=self._vector(shape.final_norm),
            head=self._linear(shape.head, shape.head_bias),
            layer=ctypes.cast(self.layers, POINTER(Layer)),
        )

    def _layer(self, layer: LayerShape, store: ExpertStore) -> Layer:
        norms = ("before_attention", "after_attention", "before_mlp", "after_mlp")
        made = Layer(
            **{to: self._vector(name) for to, name in zip(norms, layer.norms, strict=True)},
            **{
                part: self._projection(path)
                for part, path in layer.projections.items()
                if f"{path}.weight" in self._matrices
            },
            q_norm=self._vector(layer.q_norm),
            k_norm=self._vector(layer.k_norm),
            q_a_norm=self._vector(layer.q_a_norm),
            kv_a_norm=self._vector(layer.kv_a_norm),
            sinks=self._vector(layer.sinks),
            window=layer.window,
            moe=-1 if layer.moe is None else layer.moe,
            shared_gate=self._vector(layer.shared_gate),
        )
        heads = self._heads.get(f"{layer.projections['k']}.weight")
        if heads is not None:
            made.k_heads, made.v_heads = linears = heads.linears()
            self._formats.append(linears)
        if layer.mlp is not None:
            format, address = self._mlp(layer.mlp)
            made.shared_format, made.shared = ctypes.pointer(format), address
        if layer.moe is not None and layer.router is not None:
            made.router = self._router(layer.router)
            formats = self._experts(store.layers[layer.moe])
            pointers = (POINTER(ExpertFormat) * len(formats))(*map(ctypes.pointer, formats))
            made.expert_formats = pointers
            self._formats += [formats, pointers]
        return made

    def _experts(self, layer: PackedLayer) -> list[ExpertFormat]:
        shape = self.shape
        made = formats_of_layer(layer, shape.activation, alpha=shape.alpha, limit=shape.limit)
        if made is None:
            names = ", ".join(sorted({choice.name for choice in layer.codecs}))
            raise NotSupportedError(f"the kernels do not read experts encoded as {names}")
        return made

    def _router(self, router: RouterShape) -> Router:
        spec, weight = router.spec, self._tensors[router.weight]
        rule = RouterRule(
            experts=spec.num_experts,
            top_k=spec.top_k,
            score=SCORES.index(spec.score),
            normalize=bool(spec.normalize),
            groups=spec.num_groups,
            topk_groups=spec.topk_groups,
            group_sums_two=spec.group_score == "top2",
            bias_on_logits=spec.bias_on == "logits",
            scaling=spec.scaling,
            logit_scale=spec.logit_scale,
            logit_cap=spec.logit_cap,
            smallest_sum=router.smallest_sum,
        )
        return Router(
            rule=rule,
            width=self.shape.width,
            is_bf16=weight.dtype == torch.bfloat16,
            weight=weight.data_ptr(),
            bias=self._vector(router.bias),
            correction=self._vector(router.correction),
        )

    def _mlp(self, names: tuple[str, str, str]) -> tuple[ExpertFormat, int]:
        """The three matrices, wherever they are, counted from the address of the first."""
        matrices = [self._matrices[f"{name}.weight"] for name in names]
        base = matrices[0].address
        parts = {
            part: _moved(matrix.format, matrix.address - base)
            for part, matrix in zip(("gate", "up", "down"), matrices, strict=True)
        }
        shape = self.shape
        made = expert_format(parts, shape.activation, alpha=shape.alpha, limit=shape.limit)
        self._formats.append(made)
        return made, base

    def _projection(self, path: str) -> Linear:
        bias = f"{path}.bias"
        return self._linear(f"{path}.weight", bias if bias in self._tensors else None)

    def _linear(self, weight: str, bias: str | None) -> Linear:
        matrix = self._matrices[weight]
        return Linear(ctypes.pointer(matrix.format), matrix.address, self._vector(bias))

    def _vector(self, name: str | None) -> int | None:
        return None if name is None else self._tensors[name].data_ptr()


def encodes(codec: Codec | None, shape: tuple[int, ...]) -> bool:
    """Whether `codec` is one and its groups fit a matrix of `shape`."""
    group = getattr(codec, "group_size", 1)
    return codec is not None and shape[1] % group == 0


def _moved(format: Format, bytes_: int) -> Format:
    """The same matrix, counted from an address that lies so many bytes before."""
    made = Format.from_buffer_copy(format)
    made.data += bytes_
    for field in list(made.fields)[: made.num_fields]:
        for name in _OFFSETS:
            if getattr(field, name) >= 0:
                setattr(field, name, getattr(field, name) + bytes_)
    return made


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy that begins with a cache line."""
    return tensor.clone() if tensor.data_ptr() % Arena.ALIGN else tensor


def _table_dtype(stored: torch.dtype) -> torch.dtype:
    """The number format of rows that are read as they are."""
    return stored if stored == torch.bfloat16 else torch.float32
