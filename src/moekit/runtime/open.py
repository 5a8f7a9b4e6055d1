"""`open_engine`: from a path to a model that generates."""

from __future__ import annotations

from pathlib import Path

from moekit.core.errors import UserError
from moekit.core.load import load
from moekit.runtime.engine import Engine
from moekit.runtime.graph_runner import GraphRunner

# Sequences at once, where no memory limit says how many.
STREAMS = 32
# Of context where neither the caller nor the model sets a limit.
CONTEXT = 4096


def open_engine(
    path: str | Path,
    memory: int | str | None = None,
    threads: int | None = None,
    *,
    dtype: str | None = None,
    max_context: int | None = None,
    streams: int | None = None,
) -> Engine:
    """Open `babel`, a model directory or a hub id for generation.

    `threads` are CPU threads (default: torch's own choice), `dtype` the number format of the
    weights that are not packed (default: as stored), `max_context` the tokens of a sequence and
    `streams` the sequences at one time. Raises UserError as `load` does.
    """
    if memory is not None:
        raise UserError("memory: a limit needs a packed model")
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    loaded = load(path, dtype)
    config = loaded.model.config
    context = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return Engine(
        GraphRunner(loaded.model),
        spec=loaded.spec,
        config=config,
        generation_config=loaded.model.generation_config,
        tokenizer=loaded.tokenizer,
        max_context=max_context or context or CONTEXT,
        streams=streams or STREAMS,
    )
