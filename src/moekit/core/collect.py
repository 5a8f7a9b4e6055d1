"""One pass over data that feeds any number of sinks with what happens at the seam."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from moekit.core.errors import UserError
from moekit.core.port import SeamCall
from moekit.core.seam import observe

if TYPE_CHECKING:
    from moekit.core.view import MoEView


@dataclass
class Batch:
    """Token ids [B, S] with their padding mask (False or 0 at padding; None: nothing is padded).

    `domains` labels each of the B samples; `inputs` are further arguments of the model's forward.
    """

    ids: Tensor
    mask: Tensor | None = None
    domains: Sequence[str] | None = None
    inputs: dict[str, Any] = field(default_factory=dict)


class Sink(Protocol):
    """What a pass feeds. `close` is only called when the pass came to its end."""

    def start(self, view: MoEView) -> None: ...

    def batch(self, batch: Batch) -> None: ...

    def layer(self, call: SeamCall) -> None: ...

    def end_batch(self) -> None: ...

    def close(self) -> None: ...


def pad_batches(
    samples: Iterable[tuple[Sequence[int], str]],
    batch_size: int,
    *,
    pad_id: int = 0,
    side: Literal["left", "right"] = "right",
) -> Iterator[Batch]:
    """Group (token ids, domain) pairs into padded batches in their order.

    Generation needs padding on the left.
    """
    iterator = iter(samples)
    while group := list(islice(iterator, batch_size)):
        length = max(len(ids) for ids, _ in group)
        ids = torch.full((len(group), length), pad_id)
        mask = torch.zeros(len(group), length, dtype=torch.long)
        for row, (sample, _) in enumerate(group):
            columns = slice(length - len(sample), None) if side == "left" else slice(len(sample))
            ids[row, columns] = torch.as_tensor(sample, dtype=torch.long)
            mask[row, columns] = 1
        yield Batch(ids, mask, [domain for _, domain in group])


def by_length(sequences: Iterable[Tensor], most: int = 8) -> Iterator[Tensor]:
    """Sequences [1, S] of ids, those of one length together [B, S]: nothing is padded."""
    groups: dict[int, list[Tensor]] = {}
    for ids in sequences:
        groups.setdefault(ids.shape[1], []).append(ids)
    for group in groups.values():
        for start in range(0, len(group), most):
            yield torch.cat(group[start : start + most])


def collect(
    view: MoEView,
    batches: Iterable[Batch | Tensor],
    sinks: Sequence[Sink],
    *,
    logits: bool = False,
    generate: dict[str, Any] | None = None,
) -> None:
    """Run the model once over `batches`, in evaluation mode and without gradients, for all sinks.

    With `generate` (arguments of `model.generate`, such as max_new_tokens) every batch is a prompt
    to continue; calls then carry phase "prefill" or "decode", and tokens after a sequence's end
    count as padding. With `logits` the calls carry router logits.
    """
    if generate is not None and generate.get("num_beams", 1) != 1:
        raise UserError("collect: generate takes num_beams=1; beams reorder the sequences.")
    for sink in sinks:
        sink.start(view)
    ended = _Ended(view.model, generate) if generate is not None else None

    def feed(call: SeamCall) -> None:
        call = ended.mask(call) if ended is not None else call
        for sink in sinks:
            sink.layer(call)

    with _evaluating(view.model), torch.no_grad(), observe(view, feed, logits=logits):
        for batch in batches:
            if isinstance(batch, Tensor):
                batch = Batch(batch)
            for sink in sinks:
                sink.batch(batch)
            if ended is not None:
                ended.start()
            _run(view.model, batch, generate)
            for sink in sinks:
                sink.end_batch()
    for sink in sinks:
        sink.close()


def _run(model: Any, batch: Batch, generate: dict[str, Any] | None) -> None:
    # A model that is streamed from disk keeps most of its parameters on the meta device.
    devices = (p.device for p in model.parameters() if not p.is_meta)
    device = next(devices, torch.device("cpu"))
    inputs = {"input_ids": batch.ids.to(device), **batch.inputs}
    if batch.mask is not None:
        inputs["attention_mask"] = batch.mask.to(device)
    if generate is not None:
        model.generate(**inputs, **generate)
        return
    # Neither a cache nor the logits of every token are needed, and both take memory.
    spare = {"use_cache": False, "logits_to_keep": 1}
    names = inspect.signature(type(model).forward).parameters
    model(**inputs, **{k: v for k, v in spare.items() if k in names and k not in inputs})


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Ended:
    """Knows which sequences of a generating batch have ended, and so only repeat padding."""

    def __init__(self, model: Any, generate: dict[str, Any]):
        ends = generate.get("eos_token_id", model.generation_config.eos_token_id)
        self._ends = torch.tensor([] if ends is None else ends).reshape(-1)
        self.start()

    def start(self) -> None:
        self._forward_id = -1
        self._rows: Tensor | None = None

    def mask(self, call: SeamCall) -> SeamCall:
        """Return the call with the tokens of ended sequences masked out."""
        tokens = call.tokens
        if tokens.phase != "decode" or tokens.input_ids is None:
            return call
        if tokens.forward_id != self._forward_id:
            self._forward_id = tokens.forward_id
            ended = torch.isin(tokens.input_ids, self._ends.to(tokens.input_ids.device))
            self._rows = ended if self._rows is None else self._rows | ended
        assert self._rows is not None
        if not bool(self._rows.any()):
            return call
        mask = ~self._rows if tokens.mask is None else tokens.mask & ~self._rows
        return replace(call, tokens=replace(tokens, mask=mask))
