"""Experts in low precision on a CPU, computed by kernels that are built once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moekit.core.find import find_moe
from moekit.ops.grouped import GROUPED, grouped_backend, has_plain_banks

# What transformers takes by default, and what is replaced here.
STOCK = "grouped_mm"


@contextmanager
def padded_experts(model: nn.Module) -> Iterator[None]:
    """Run transformers' `grouped_mm` experts with padded rows, where that saves time.

    oneDNN builds a kernel for every number of rows it meets, and an expert's is new nearly every
    time; see `ops.grouped`. That is in 16 bits on a CPU; elsewhere, and for experts with banks of
    another form or an implementation of the user's choice, nothing changes. The sums are the same.
    """
    if not _saves(model):
        yield
        return
    ALL_EXPERTS_FUNCTIONS.register(GROUPED, grouped_backend)
    whole: Any = model
    whole.set_experts_implementation(GROUPED)
    try:
        yield
    finally:
        whole.set_experts_implementation(STOCK)


def _saves(model: nn.Module) -> bool:
    if not hasattr(model, "set_experts_implementation"):
        return False
    first = next(model.parameters())
    chosen = {
        getattr(getattr(module, "config", None), "_experts_implementation", STOCK)
        for module in model.modules()
    }
    sites = find_moe(model)
    return (
        first.device.type == "cpu"
        and first.dtype.itemsize == 2
        and chosen == {STOCK}
        and bool(sites)
        and all(has_plain_banks(site.experts) for site in sites)
    )
