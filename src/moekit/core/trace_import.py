"""Routing recorded by vLLM and SGLang, as a `RoutingTrace`.

What is read, from .npy, .json and .jsonl files (pickles are refused):
- an array of expert ids [T, L, K], one text, as vLLM's `routed_experts` (-1: not known);
- responses of either server with `routed_experts` in them: nested lists, a base64 .npy file (vLLM)
  or base64 int32 numbers (SGLang: [T, L, K] flattened, T one less than the tokens of the text);
- records of SGLang's expert distribution recorder in its mode per_token, written as JSON:
  `topk_ids_of_layer` [L, T, K] of physical experts, and `last_physical_to_logical_map` [L, P].

L is the number of MoE layers, or of all decoder layers, of which the others are then left out.
Servers do not tell the weights, so these are not-a-number. Shapes: T tokens, L layers, K choices.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moekit.core.errors import UserError
from moekit.core.spec import MoESpec
from moekit.core.trace import DECODE, PREFILL, RoutingTrace
from moekit.core.trace_files import HEADER, MemoryChunk, TraceHeader, TraceLayer

SUFFIXES = (".npy", ".json", ".jsonl")
PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin")
# Where SGLang puts it, in its own and in its OpenAI responses.
NESTED = ("meta_info", "sgl_ext")
NPY_MAGIC = b"\x93NUMPY"
Ids = NDArray[np.int64]


@dataclass
class _Text:
    """One text: ids [T, L, K] or flat, token ids [T] or None, and how many tokens were prompt."""

    where: str
    domain: str
    ids: Ids
    tokens: Sequence[int] | None = None
    prompt: int | None = None


def is_recorded(path: Path) -> bool:
    """Whether a path is a file of another server, as far as its name tells."""
    known = path.suffix in (*SUFFIXES, *PICKLES) and path.name != HEADER
    return known and not path.is_dir()


def import_traces(paths: Sequence[str | Path], spec: MoESpec) -> RoutingTrace:
    """Read recorded routing of the model that `spec` describes; the domain is the file's name.

    Raises UserError, naming the file and the numbers, for a file of another kind, ids outside of
    the layer's experts, another number of layers or choices than the model's, and ids that repeat
    within a token, which servers return where they recorded nothing.
    """
    texts = [
        replace(text, ids=_checked(text, spec)) for path in paths for text in _read(Path(path))
    ]
    if not texts:
        raise UserError("no routing in the files given")
    domains = list(dict.fromkeys(text.domain for text in texts))
    header = TraceHeader(
        spec.model_type,
        [
            TraceLayer(m.layer_index, m.path, m.num_experts, m.num_experts, m.top_k)
            for m in spec.per_layer
        ],
        lengths=[len(text.ids) for text in texts],
        sample_domains=[domains.index(text.domain) for text in texts],
        domains=domains,
        metadata={"weights": "unknown", "imported": [Path(path).name for path in paths]},
    )
    ids = np.concatenate([text.ids for text in texts])
    tensors = {
        "tokens": torch.tensor(np.concatenate([_tokens(text) for text in texts])),
        "phase": torch.tensor(np.concatenate([_phase(text) for text in texts])),
    }
    for position, layer in enumerate(spec.per_layer):
        own = torch.tensor(ids[:, position, : layer.top_k], dtype=torch.int16)
        tensors[f"ids.{position}"] = own
        weights = torch.full(own.shape, float("nan"))
        tensors[f"weights.{position}"] = weights.masked_fill(own < 0, 0)
    return RoutingTrace(header, [MemoryChunk(tensors)])


# -- files --


def _read(path: Path) -> Iterator[_Text]:
    domain = path.name.split(".")[0]
    if path.suffix in PICKLES:
        raise UserError(
            f"{path} is a pickle, which can run code when it is read, so moekit does not: save the "
            "array of ids with numpy.save, or the records as JSON, where it was made"
        )
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: recorded routing is read from {', '.join(SUFFIXES)} files")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if path.suffix == ".npy":
        yield _Text(str(path), domain, _npy(content, str(path)))
        return
    lines = content.splitlines() if path.suffix == ".jsonl" else [content]
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}" if path.suffix == ".jsonl" else str(path)
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where} is no JSON: {error}") from error
            yield from _texts(record, where, domain)


def _npy(content: bytes, where: str) -> Ids:
    try:
        array = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{where} is no array of numbers: {error}") from error
    return _integers(array, where)


def _integers(value: Any, where: str) -> Ids:
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise UserError(f"{where}: the ids have rows of different lengths") from error
    if array.dtype.kind not in "iu":
        raise UserError(f"{where}: expert ids must be whole numbers, not {array.dtype}")
    return array.astype(np.int64)


# -- records --


def _texts(record: Any, where: str, domain: str) -> Iterator[_Text]:
    """The texts of one JSON value: a response, a recorder's dump, an array, or a list of those."""
    if isinstance(record, list):
        if record and isinstance(record[0], dict):
            for number, item in enumerate(record):
                yield from _texts(item, f"{where}[{number}]", domain)
            return
        yield _Text(where, domain, _integers(record, where))
        return
    if not isinstance(record, dict):
        raise UserError(f"{where}: neither an array of ids nor a response")
    if "logical_count" in record:
        raise UserError(
            f"{where} holds counts by expert only; record with the mode per_token instead of stat"
        )
    if "records" in record or "topk_ids_of_layer" in record:
        mapping = record.get("last_physical_to_logical_map")
        for number, one in enumerate(record.get("records", [record])):
            yield from _recorded(one, mapping, f"{where} record {number}", domain)
        return
    found = False
    for text in _responses(record, where, domain):
        found = True
        yield text
    if not found:
        raise UserError(f"{where}: no routed_experts in it; was the server told to return them?")


def _responses(record: dict[str, Any], where: str, domain: str) -> Iterator[_Text]:
    domain = str(record.get("domain", domain))
    prompt_tokens = _numbers(record, "prompt_token_ids", where) or _numbers(
        record, "input_ids", where
    )
    for choice in record.get("choices") or [record]:
        if not isinstance(choice, dict):
            raise UserError(f"{where}: a choice is no object")
        parts = [choice, *(p for p in map(choice.get, NESTED) if isinstance(p, dict))]
        value = next((part["routed_experts"] for part in parts if part.get("routed_experts")), None)
        if value is None:
            continue
        ids = _decoded(value, where)
        before = _numbers(choice, "prompt_token_ids", where) or prompt_tokens
        prompt = len(before) if before is not None else None
        if record.get("prompt_routed_experts") is not None:
            first = _decoded(record["prompt_routed_experts"], where)
            if first.shape[1:] != ids.shape[1:]:
                raise UserError(
                    f"{where}: ids of the prompt are {list(first.shape)}, of the rest "
                    f"{list(ids.shape)}"
                )
            prompt, ids = len(first), np.concatenate([first, ids])
        after = _numbers(choice, "token_ids", where) or _numbers(choice, "output_ids", where)
        tokens = None if before is None or after is None else [*before, *after]
        yield _Text(where, domain, ids, tokens, prompt)


def _numbers(record: dict[str, Any], name: str, where: str) -> list[int] | None:
    value = record.get(name)
    if value is None:
        return None
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise UserError(f"{where}: {name} is no list of whole numbers")
    return value


def _decoded(value: Any, where: str) -> Ids:
    if not isinstance(value, str):
        return _integers(value, where)
    try:
        content = base64.b64decode(value, validate=True)
    except binascii.Error as error:
        raise UserError(f"{where}: routed_experts is no base64: {error}") from error
    if content.startswith(NPY_MAGIC):
        return _npy(content, where)
    if len(content) % 4:
        raise UserError(f"{where}: {len(content)} bytes of routed_experts are no int32 numbers")
    return np.frombuffer(content, dtype="<i4").astype(np.int64)


def _recorded(record: dict[str, Any], mapping: Any, where: str, domain: str) -> Iterator[_Text]:
    """The texts of one forward pass: sequences of a prefill, or one token of each in a decode."""
    if "topk_ids_of_layer" not in record:
        raise UserError(f"{where} has no topk_ids_of_layer; record with the mode per_token")
    ids = _integers(record["topk_ids_of_layer"], where)
    if ids.ndim != 3:
        raise UserError(f"{where}: topk_ids_of_layer is {list(ids.shape)}, expected [L, T, K]")
    if mapping is not None:
        ids = _logical(ids, _integers(mapping, where), where)
    ids = ids.transpose(1, 0, 2)
    tokens = _numbers(record, "input_ids", where)
    lengths = _numbers(record, "extend_seq_lens", where)
    # Without them this was a decode: one token of every running sequence, which nothing names.
    prompt = lengths is not None
    if lengths is None:
        lengths = [1] * len(ids)
    if sum(lengths) != len(ids) or (tokens is not None and len(tokens) != len(ids)):
        raise UserError(f"{where}: {len(ids)} tokens, but sequences of {sum(lengths)} in all")
    start = 0
    for length in lengths:
        stop = start + length
        own = None if tokens is None else tokens[start:stop]
        yield _Text(where, domain, ids[start:stop], own, length if prompt else 0)
        start = stop


def _logical(ids: Ids, mapping: Ids, where: str) -> Ids:
    """Ids of physical experts [L, T, K] as those of the model; -1 stays."""
    if mapping.ndim != 2 or len(mapping) != len(ids) or ids.max(initial=-1) >= mapping.shape[1]:
        raise UserError(
            f"{where}: the physical-to-logical map is {list(mapping.shape)}, the ids are "
            f"{list(ids.shape)} up to {ids.max(initial=-1)}"
        )
    layers = np.arange(len(ids))[:, None, None]
    return np.where(ids < 0, -1, mapping[layers, np.maximum(ids, 0)])


# -- checks --


def _checked(text: _Text, spec: MoESpec) -> Ids:
    """The ids [T, L, K] of the MoE layers of the model."""
    ids, width = text.ids, spec.top_k
    moe = len(spec.per_layer)
    if ids.ndim == 1:
        ids = _shaped(text, spec)
    if ids.ndim != 3 or ids.shape[1] not in (moe, spec.num_layers) or ids.shape[2] < width:
        raise UserError(
            f"{text.where}: ids are {list(ids.shape)}; the model needs [tokens, {moe} MoE layers"
            + (f" or {spec.num_layers} layers" if spec.num_layers != moe else "")
            + f", {width}]"
        )
    if ids.shape[1] != moe:
        ids = ids[:, list(spec.moe_layers)]
    if (ids[:, :, width:] >= 0).any():
        raise UserError(
            f"{text.where}: {ids.shape[2]} choices a token; the model's top k is {width}"
        )
    ids = ids[:, :, :width]
    for position, layer in enumerate(spec.per_layer):
        own = ids[:, position]
        if len(own) and (own.max() >= layer.num_experts or own.min() < -1):
            bad = own.max() if own.max() >= layer.num_experts else own.min()
            raise UserError(
                f"{text.where}: expert {bad} in layer {layer.layer_index}, whose experts are 0 to "
                f"{layer.num_experts - 1}"
            )
        ordered = np.sort(own, axis=1)
        again = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
        if again.any():
            token = int(np.nonzero(again.any(1))[0][0])
            raise UserError(
                f"{text.where}: token {token} has {own[token].tolist()} in layer "
                f"{layer.layer_index}; no router chooses an expert twice, so the server did not "
                "record this layer"
            )
    return ids


def _shaped(text: _Text, spec: MoESpec) -> Ids:
    """Flat ids as [T, L, K]: over all decoder layers, which SGLang records, or the MoE layers."""
    known = len(text.tokens) - 1 if text.tokens is not None else None
    for layers in dict.fromkeys((spec.num_layers, len(spec.per_layer))):
        tokens, rest = divmod(text.ids.size, layers * spec.top_k)
        if not rest and known in (None, tokens, tokens - 1):
            return text.ids.reshape(tokens, layers, spec.top_k)
    raise UserError(
        f"{text.where}: {text.ids.size} ids are not tokens x {spec.num_layers} layers x "
        f"{spec.top_k}" + (f" for {known + 1} tokens" if known is not None else "")
    )


def _tokens(text: _Text) -> NDArray[np.int32]:
    """Token ids [T], -1 where unknown; the last token of a text may have no routing."""
    if text.tokens is None:
        return np.full(len(text.ids), -1, dtype=np.int32)
    if not 0 <= len(text.tokens) - len(text.ids) <= 1:
        raise UserError(
            f"{text.where}: routing of {len(text.ids)} tokens and {len(text.tokens)} token ids"
        )
    return np.asarray(text.tokens[: len(text.ids)], dtype=np.int32)


def _phase(text: _Text) -> NDArray[np.uint8]:
    phase = np.full(len(text.ids), PREFILL, dtype=np.uint8)
    if text.prompt is not None:
        phase[text.prompt :] = DECODE
    return phase
