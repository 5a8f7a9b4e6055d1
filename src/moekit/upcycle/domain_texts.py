"""Texts by domain, each the domain of one expert, and the windows of tokens they are cut into.

Shapes: N windows, S tokens a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moekit.core.errors import UserError
from moekit.core.load import load_tokenizer
from moekit.core.seeds import generator
from moekit.core.source_model import SourceModel
from moekit.evaluate.text import read_texts
from moekit.upcycle.converter import Job

DOMAINS_HELP = "domains of --data in the order of the experts; the models' names unless given"


def texts_by_domain(job: Job) -> dict[str, list[str]]:
    """The documents of --data, by domain in order of appearance.

    Raises `UserError` without --data, and as `read_texts`.
    """
    if not job.data:
        raise UserError("this method learns from text: give it with --data.")
    found: dict[str, list[str]] = {}
    for sample in read_texts(job.data):
        found.setdefault(sample.domain, []).append(sample.text)
    return found


def all_texts(job: Job) -> list[str]:
    """The documents of --data, of whatever domain; raises as `texts_by_domain`."""
    return [text for documents in texts_by_domain(job).values() for text in documents]


def texts_of_others(job: Job, domains: str | None) -> list[list[str]]:
    """The documents of the domain of each model of --from; `UserError` for one without any."""
    experts = job.others
    names = domains.split() if domains else [Path(expert.name).name for expert in experts]
    if len(names) != len(experts):
        raise UserError(f"domains names {len(names)} domains for {len(experts)} experts.")
    found = texts_by_domain(job)
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(
            f"--data has no text of {', '.join(missing)}, it has {', '.join(found)}. Say which "
            "domain is whose with domains: one name an expert, in the order of the models."
        )
    return [found[name] for name in names]


def tokenizer_of(model: SourceModel) -> Any:
    """The model's tokenizer; `UserError` where it has none."""
    tokenizer = load_tokenizer(model.directory)
    if tokenizer is None:
        raise UserError(f"{model.name} has no tokenizer, so it cannot read --data.")
    return tokenizer


def windows_of(tokenizer: Any, texts: Sequence[str], length: int, count: int, seed: int) -> Tensor:
    """At most `count` windows [N, S] of the texts, in an order drawn by `seed`.

    Documents follow each other with the end-of-text token between them; what is left over at the
    end is dropped. Raises `UserError` for less text than one window.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = [
        token
        for text in texts
        for token in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + end
    ]
    whole = len(ids) // length
    if not whole:
        raise UserError(f"--data has {len(ids)} tokens, fewer than one window of {length}.")
    windows = torch.tensor(ids[: whole * length]).view(whole, length)
    order = torch.randperm(whole, generator=generator(seed, "windows of text"))
    return windows[order[:count]]
