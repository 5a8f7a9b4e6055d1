"""BAM: the FFNs and the attention blocks of several dense models as experts of one."""

from __future__ import annotations

from typing import Any

import torch

from moekit.core.architecture import meta_model
from moekit.core.deferred import Deferred
from moekit.core.errors import UserError
from moekit.upcycle.converter import Job, Made, preset, upcycler
from moekit.upcycle.ffn import constant, mean
from moekit.upcycle.model.attention_experts import KEY_VALUE
from moekit.upcycle.model.blocks import attention_blocks, mlp_blocks
from moekit.upcycle.model.config import experts_config
from moekit.upcycle.routers import ROUTERS, initial_rows
from moekit.upcycle.start import Start
from moekit.upcycle.upcycled import LOADS_HERE, PREFIX, check_same_family, config_of, names_of

GATES = ("probability", "one")


@upcycler(
    "bam",
    title="Attention and FFNs of several models as experts, keys and values one set an expert",
    paper="BAM 2408.08274",
    needs=("weights",),
    limits="Loads through moekit; the base itself is the first expert. One KV cache an expert.",
    options={
        "shared_kv": "average the keys' and values' projections and keep one cache for all",
        "gate": f"{' or '.join(GATES)}: the weight of the chosen FFN; one leaves its router alone",
        "router": f"{', '.join(ROUTERS)}: the rows of all routers",
    },
)
def bam(
    job: Job, *, shared_kv: bool = False, gate: str = "probability", router: str = "random"
) -> Made:
    """The model of these experts; `UserError` for models that are not fine-tunes of one."""
    job.need_dense()
    names_of(job)
    check_same_family(job)
    if gate not in GATES:
        raise UserError(f"gate {gate!r} is unknown; there are {' and '.join(GATES)}.")
    models = (job.base, *job.others)
    text: Any = job.base.config
    dense = meta_model(text)
    ffns = {block.path: block.index for block in mlp_blocks(dense)}
    attention = {block.path: block.index for block in attention_blocks(dense)}
    experts = experts_config(text, len(models), int(text.intermediate_size))
    experts.norm_topk_prob = gate == "one"
    config = config_of(
        job.base, "attention-experts", experts, num_experts=len(models), shared_kv=shared_kv
    )
    made: dict[str, Deferred] = {}
    for name in job.base.tensors:
        of_all = [model.tensors[name] for model in models]
        path = next((p for p in attention if name.startswith(f"{p}.")), None)
        if path is not None:
            rest = name.removeprefix(f"{path}.")
            own = enumerate(of_all)
            if shared_kv and rest.split(".")[0] in KEY_VALUE:
                own = enumerate([mean(of_all)])
            made |= {f"{PREFIX}{path}.experts.{j}.{rest}": tensor for j, tensor in own}
        elif not any(name.startswith(f"{p}.") for p in ffns):
            made[PREFIX + name] = mean(of_all)
    width = int(text.hidden_size)
    for path, layer in ffns.items():
        for name, bank in _bank([model.tensors for model in models], path).items():
            made[f"{PREFIX}{path}.experts.{name}"] = bank
        dtype = job.base.tensors[f"{path}.gate_proj.weight"].dtype
        rows = initial_rows(router, len(models), width, job.seed, layer).to(dtype)
        made[f"{PREFIX}{path}.gate.weight"] = constant(rows)
    for path, layer in attention.items():
        dtype = next(t.dtype for n, t in job.base.tensors.items() if n.startswith(f"{path}."))
        rows = initial_rows(router, len(models), width, job.seed + 1, layer).to(dtype)
        made[f"{PREFIX}{path}.router.weight"] = constant(rows)
    return Made(config, made, _start(gate), [LOADS_HERE])


def _bank(models: list[Any], path: str) -> dict[str, Deferred]:
    """gate and up [N, 2F, D] and down [N, D, F] of the FFNs at one path of all models."""

    def of(tensors: Any, part: str) -> Any:
        return tensors[f"{path}.{part}_proj.weight"]

    gate_up: Any = torch.stack([torch.cat([of(t, "gate"), of(t, "up")]) for t in models])
    down: Any = torch.stack([of(t, "down") for t in models])
    return {"gate_up_proj": gate_up, "down_proj": down}


def _start(gate: str) -> Start:
    same = "Where all models are the same the attention is theirs whatever the router"
    if gate == "one":
        return Start.not_equal(
            f"norms and embeddings are means of several models. {same}, and so is the FFN."
        )
    return Start.not_equal(
        f"norms and embeddings are means of several models, and the chosen FFN counts by its "
        f"probability. {same}; gate=one makes the FFN theirs too."
    )


preset(
    bam,
    "bam-shared-kv",
    title="Attention and FFNs of several models as experts, keys and values shared",
    paper="BAM 2408.08274",
    needs=("weights",),
    limits="Loads through moekit; the base itself is the first expert. One KV cache for all.",
    settings={"shared_kv": True},
)
