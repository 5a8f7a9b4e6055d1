"""Tensors that are not there yet: operations on them are noted down and carried out when read.

A `Deferred` is a `torch.Tensor` with a shape and a dtype but no data, standing for a tensor on disk
or for operations on such tensors. `read(region)` computes only that block, and reads only what the
block needs: stacking 256 experts and concatenating gate and up costs one expert of memory at a
time. The conversion operations of transformers run on `Deferred`s unchanged, which is how a fused
bank larger than memory is made and unmade.

An operation without a rule here still works, but reading any part of its result computes all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

# One (start, stop) per axis.
Region = tuple[tuple[int, int], ...]
Reader = Callable[[Region], torch.Tensor]

PIECE_BYTES = 64 * 2**20

_aten = torch.ops.aten


def full_region(shape: torch.Size | tuple[int, ...]) -> Region:
    return tuple((0, size) for size in shape)


class Deferred(torch.Tensor):
    """A tensor computed by `reader(region)` when it is read."""

    _reader: Reader

    @staticmethod
    def __new__(
        cls, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, reader: Reader
    ) -> Deferred:
        tensor = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype)
        tensor._reader = reader
        return tensor

    def __init__(self, *_: Any) -> None:
        pass

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Deferred(shape={list(self.shape)}, dtype={self.dtype})"

    def read(self, region: Region | None = None) -> torch.Tensor:
        """The values of `region` (default: all of it)."""
        region = full_region(self.shape) if region is None else region
        block = self._reader(region)
        assert block.dtype == self.dtype
        assert tuple(block.shape) == tuple(stop - start for start, stop in region)
        return block

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """`tensor[start:stop]` along the first axis."""
        return self.read(((start, stop), *full_region(self.shape)[1:]))

    def pieces(
        self, first: int = 0, piece_bytes: int = PIECE_BYTES
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """(row, rows from there) from row `first`, each at most `piece_bytes` or one row."""
        if self.ndim == 0:
            yield 0, self.read()
            return
        row_bytes = max(1, math.prod(self.shape[1:]) * self.dtype.itemsize)
        step = max(1, piece_bytes // row_bytes)
        for start in range(first, self.shape[0], step):
            yield start, self.rows(start, min(start + step, self.shape[0]))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        outputs = _meta_outputs(func, args, kwargs)
        rule = _RULES.get(func)
        readers = rule(outputs, *args, **kwargs) if rule is not None else None
        if readers is None:
            readers = _compute_all(func, args, kwargs, outputs)
        made = [
            Deferred(out.shape, out.dtype, reader)
            for out, reader in zip(outputs, readers, strict=True)
        ]
        return made if len(func._schema.returns) == 1 and _returns_list(func) else made[0]


def _returns_list(func: Any) -> bool:
    return str(func._schema.returns[0].type) == "List[Tensor]"


def _meta_outputs(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """Shapes and dtypes of the results, from running the operation without data."""
    schema = func._schema
    if schema.is_mutable or len(schema.returns) != 1:
        raise NotImplementedError(f"{func} on tensors that are not loaded")

    def empty(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    margs, mkwargs = tree_map_only(torch.Tensor, empty, (args, dict(kwargs)))
    if "device" in mkwargs:
        mkwargs["device"] = torch.device("meta")
    outputs = func(*margs, **mkwargs)
    outputs = list(outputs) if isinstance(outputs, list | tuple) else [outputs]
    if not all(isinstance(out, torch.Tensor) for out in outputs):
        raise NotImplementedError(f"{func} on tensors that are not loaded")
    return outputs


def _compute_all(func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> list[Reader]:
    def reader(index: int) -> Reader:
        def read(region: Region) -> torch.Tensor:
            # A Deferred has the strides of a contiguous tensor, which `view` relies on.
            loaded_args, loaded_kwargs = tree_map_only(
                Deferred, lambda tensor: tensor.read().contiguous(), (args, dict(kwargs))
            )
            result = func(*loaded_args, **loaded_kwargs)
            block = result[index] if isinstance(result, list | tuple) else result
            return block[tuple(slice(start, stop) for start, stop in region)]

        return read

    return [reader(index) for index in range(len(outputs))]


def _shifted(region: Region, axis: int, offset: int) -> Region:
    start, stop = region[axis]
    return (*region[:axis], (start + offset, stop + offset), *region[axis + 1 :])


def _narrowed(source: Deferred, axis: int, offset: int) -> Reader:
    return lambda region: source.read(_shifted(region, axis, offset))


def _selected(source: Deferred, axis: int, index: int) -> Reader:
    def read(region: Region) -> torch.Tensor:
        block = source.read((*region[:axis], (index, index + 1), *region[axis:]))
        return block.squeeze(axis)

    return read


def _stack(outputs: list[torch.Tensor], tensors: list[Deferred], dim: int = 0) -> list[Reader]:
    axis = dim % outputs[0].ndim

    def read(region: Region) -> torch.Tensor:
        rest = (*region[:axis], *region[axis + 1 :])
        start, stop = region[axis]
        if start == stop:
            return torch.empty([b - a for a, b in region], dtype=outputs[0].dtype)
        return torch.stack([_read(tensor, rest) for tensor in tensors[start:stop]], dim=axis)

    return [read]


def _read(tensor: torch.Tensor, region: Region) -> torch.Tensor:
    if isinstance(tensor, Deferred):
        return tensor.read(region)
    return tensor[tuple(slice(start, stop) for start, stop in region)]


def _cat(outputs: list[torch.Tensor], tensors: list[Deferred], dim: int = 0) -> list[Reader]:
    axis = dim % outputs[0].ndim
    if any(
        tensor.ndim != outputs[0].ndim or tensor.dtype != outputs[0].dtype for tensor in tensors
    ):
        return _compute_all(_aten.cat.default, (tensors, dim), {}, outputs)

    def read(region: Region) -> torch.Tensor:
        start, stop = region[axis]
        blocks, offset = [], 0
        for tensor in tensors:
            size = tensor.shape[axis]
            a, b = max(start - offset, 0), min(stop - offset, size)
            if a < b:
                blocks.append(_read(tensor, (*region[:axis], (a, b), *region[axis + 1 :])))
            offset += size
        if not blocks:
            return torch.empty([b - a for a, b in region], dtype=outputs[0].dtype)
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=axis)

    return [read]


def _split(outputs: list[torch.Tensor], source: Deferred, sizes: Any, dim: int = 0) -> list[Reader]:
    axis = dim % source.ndim
    readers, offset = [], 0
    for out in outputs:
        readers.append(_narrowed(source, axis, offset))
        offset += out.shape[axis]
    return readers


def _unbind(outputs: list[torch.Tensor], source: Deferred, dim: int = 0) -> list[Reader]:
    return [_selected(source, dim % source.ndim, index) for index in range(len(outputs))]


def _slice(
    outputs: list[torch.Tensor],
    source: Deferred,
    dim: int = 0,
    start: int | None = None,
    stop: int | None = None,
    step: int = 1,
) -> list[Reader] | None:
    if step != 1:
        return None
    axis = dim % source.ndim
    return [_narrowed(source, axis, slice(start, stop).indices(source.shape[axis])[0])]


def _select(outputs: list[torch.Tensor], source: Deferred, dim: int, index: int) -> list[Reader]:
    axis = dim % source.ndim
    return [_selected(source, axis, index % source.shape[axis])]


def _permute(outputs: list[torch.Tensor], source: Deferred, dims: list[int]) -> list[Reader]:
    order = [dim % source.ndim for dim in dims]

    def read(region: Region) -> torch.Tensor:
        inner = [(0, 0)] * len(order)
        for position, axis in enumerate(order):
            inner[axis] = region[position]
        return source.read(tuple(inner)).permute(order)

    return [read]


def _transpose(outputs: list[torch.Tensor], source: Deferred, dim0: int, dim1: int) -> list[Reader]:
    order = list(range(source.ndim))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permute(outputs, source, order)


def _t(outputs: list[torch.Tensor], source: Deferred) -> list[Reader]:
    return _permute(outputs, source, list(range(source.ndim))[::-1])


def _unsqueeze(outputs: list[torch.Tensor], source: Deferred, dim: int) -> list[Reader]:
    axis = dim % outputs[0].ndim

    def read(region: Region) -> torch.Tensor:
        block = source.read((*region[:axis], *region[axis + 1 :])).unsqueeze(axis)
        return block.narrow(axis, region[axis][0], region[axis][1] - region[axis][0])

    return [read]


def _squeeze(outputs: list[torch.Tensor], source: Deferred, dim: int) -> list[Reader]:
    axis = dim % source.ndim
    return _same(outputs, source) if source.shape[axis] != 1 else [_selected(source, axis, 0)]


def _reshape(outputs: list[torch.Tensor], source: Deferred, size: Any) -> list[Reader] | None:
    """Rows of the result are a run of elements, which lie in a run of rows of the source."""
    shape = outputs[0].shape
    if not shape or not source.ndim or source.numel() == 0:
        return None
    row, source_row = math.prod(shape[1:]), math.prod(source.shape[1:])

    def read(region: Region) -> torch.Tensor:
        start, stop = region[0]
        first = start * row // source_row
        rows = source.rows(first, max(first, -(-stop * row // source_row)))
        run = rows.reshape(-1)[start * row - first * source_row :][: (stop - start) * row]
        block = run.reshape(stop - start, *shape[1:])
        return block[(slice(None), *(slice(a, b) for a, b in region[1:]))]

    return [read]


def _index_select(
    outputs: list[torch.Tensor], source: Deferred, dim: int, index: torch.Tensor
) -> list[Reader]:
    axis = dim % source.ndim
    ids = index.tolist()

    def read(region: Region) -> torch.Tensor:
        wanted = ids[slice(*region[axis])]
        blocks = [
            source.read((*region[:axis], (i, j), *region[axis + 1 :])) for i, j in _runs(wanted)
        ]
        if not blocks:
            return torch.empty([b - a for a, b in region], dtype=source.dtype)
        return torch.cat(blocks, dim=axis)

    return [read]


def _runs(ids: list[int]) -> Iterator[tuple[int, int]]:
    """Consecutive ids as (first, last + 1), so that neighbours are read together."""
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or ids[end] != ids[end - 1] + 1:
            yield ids[start], ids[end - 1] + 1
            start = end


def _same(outputs: list[torch.Tensor], source: Deferred, *_: Any, **__: Any) -> list[Reader]:
    return [source.read]


def _cast(outputs: list[torch.Tensor], source: Deferred, *_: Any, **__: Any) -> list[Reader]:
    return [lambda region: source.read(region).to(outputs[0].dtype)]


# Each rule gets the results (shape and dtype only) and the arguments of the operation, and returns
# one reader per result, or None for the general way.
_RULES: dict[Any, Callable[..., list[Reader] | None]] = {
    _aten.stack.default: _stack,
    _aten.cat.default: _cat,
    _aten.split.Tensor: _split,
    _aten.split_with_sizes.default: _split,
    _aten.unbind.int: _unbind,
    _aten.slice.Tensor: _slice,
    _aten.select.int: _select,
    _aten.permute.default: _permute,
    _aten.transpose.int: _transpose,
    _aten.t.default: _t,
    _aten.unsqueeze.default: _unsqueeze,
    _aten.squeeze.dim: _squeeze,
    _aten.view.default: _reshape,
    _aten._unsafe_view.default: _reshape,
    _aten.reshape.default: _reshape,
    _aten.index_select.default: _index_select,
    _aten.clone.default: _same,
    _aten.detach.default: _same,
    _aten.alias.default: _same,
    _aten.lift_fresh.default: _same,
    _aten._to_copy.default: _cast,
}
