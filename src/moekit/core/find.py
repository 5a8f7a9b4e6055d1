"""Find the MoE layers of a module tree by their structure; works on meta-device models too."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

from torch import nn


@dataclass
class MoESite:
    """Where one MoE layer sits: the block, its experts, its router and what is shared beside them.

    `path` and `layer_index` name the block and its decoder layer. `kind` is "seam" when the experts
    are called as experts(hidden [T, D], ids [T, K], weights [T, K]), else "adapter"; then `adapter`
    is the class of `moekit.families` that translates. In an adapter family whose experts are not
    a module of their own, `experts` is the block itself.
    """

    path: str
    layer_index: int
    block: nn.Module
    experts: nn.Module
    experts_path: str
    router: nn.Module | None
    router_path: str | None
    kind: Literal["seam", "adapter"]
    shared: list[tuple[str, nn.Module]] = field(default_factory=list)
    adapter: Any = None


def find_moe(model: nn.Module) -> list[MoESite]:
    """List the MoE layers of `model` in the order in which its modules are declared.

    A dense model gives an empty list. Layers that share one experts module are listed once.
    """
    modules = dict(model.named_modules())
    families = import_module("moekit.families").ADAPTERS
    sites = []
    adapted = set()
    for path, module in modules.items():
        adapter = next((a for a in families if a.matches(module)), None)
        if adapter is not None:
            sites.append(_site(modules, path, adapter))
            adapted.add(sites[-1].experts_path)
        elif path not in adapted and is_seam_experts(module):
            sites.append(_seam_site(modules, path.rpartition(".")[0], path))
    return sites


def is_seam_experts(module: nn.Module) -> bool:
    """Whether `module` keeps a fused bank [E, ., .] and is called with hidden, ids and weights."""
    parameters = module._parameters
    down = parameters.get("down_proj")
    up = parameters.get("gate_up_proj")
    up = up if up is not None else parameters.get("up_proj")
    if down is None or up is None or down.dim() != 3 or up.dim() != 3:
        return False
    names = tuple(inspect.signature(type(module).forward).parameters)[1:]
    return len(names) == 3 and "ind" in names[1] and "weight" in names[2]


def _seam_site(modules: dict[str, nn.Module], block_path: str, experts_path: str) -> MoESite:
    block = modules[block_path]
    name = next(
        (n for n in ("gate", "router") if isinstance(getattr(block, n, None), nn.Module)), None
    )
    return MoESite(
        path=block_path,
        layer_index=layer_index(block_path),
        block=block,
        experts=modules[experts_path],
        experts_path=experts_path,
        router=getattr(block, name) if name else None,
        router_path=_join(block_path, name) if name else None,
        kind="seam",
        shared=list(_shared(modules, block_path)),
    )


def _site(modules: dict[str, nn.Module], block_path: str, adapter: Any) -> MoESite:
    block = modules[block_path]
    experts_path = _join(block_path, adapter.experts_name)
    router_path = _join(block_path, adapter.router_name) if adapter.router_name else None
    shared = [
        (_join(block_path, n), modules[_join(block_path, n)])
        for n in adapter.shared_names
        if n in dict(block.named_children())
    ]
    return MoESite(
        path=block_path,
        layer_index=layer_index(block_path),
        block=block,
        experts=modules[experts_path],
        experts_path=experts_path,
        router=modules[router_path] if router_path else None,
        router_path=router_path,
        kind="adapter",
        shared=shared or list(_shared(modules, block_path)),
        adapter=adapter,
    )


def layer_index(path: str) -> int:
    """Return the first number in a module path: the layer in its stack (0 when there is none)."""
    return next((int(part) for part in path.split(".") if part.isdigit()), 0)


def _shared(modules: dict[str, nn.Module], block_path: str) -> Iterator[tuple[str, nn.Module]]:
    # Granite puts the shared MLP beside the MoE block and Ernie VL above it, so look up to the
    # decoder layer, which is the first ancestor whose name is a number.
    path = block_path
    while True:
        for name, child in modules[path].named_children():
            if "shared" in name and next(child.parameters(), None) is not None:
                yield _join(path, name), child
        if not path or path.rpartition(".")[2].isdigit():
            return
        path = path.rpartition(".")[0]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name
