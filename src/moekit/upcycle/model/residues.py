"""Routed residues: one shared model and, for each expert, the low-rank rest that it is more.

Two ways to use them are one layer type. Mixed in the weights, a token is computed by the shared
weights plus the gated sum of the experts' residues, everywhere in the model (Twin-Merging,
arXiv 2406.15479). Mixed in the outputs, an expert is a whole feed-forward block, the shared one
plus its residues, and the chosen blocks' outputs are added (FlexMoRE, arXiv 2602.08818).

Shapes: B sequences, S positions, D width, E experts, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import embedding, linear
from transformers import PreTrainedModel

from moekit.ops.routed_lowrank import routed_low_rank
from moekit.upcycle.model.blocks import PROJECTIONS, mlp_blocks
from moekit.upcycle.model.residue_routers import ExampleRouter, TokenRouter

# The modules whose residues may be factors; subclasses may do more than their product.
MATRIX_TYPES = (nn.Linear, nn.Embedding)


class ResiduesPart(nn.Module):
    """Puts residues into a base model. Options of the config's part:

    `mix` "weights" or "outputs"; `experts`, their names; `ranks`, one number an expert, or `share`
    of a matrix's smaller side. With "weights": `sites`, the modules that have residues, and `pool`
    "prefix" or "sequence". With "outputs": `top_k`.
    """

    def __init__(self, base: PreTrainedModel, config: Any) -> None:
        super().__init__()
        part = config.part
        self.mix, num_experts = part["mix"], len(part["experts"])
        self.causal = self.mix == "outputs" or part["pool"] == "prefix"
        if self.mix == "outputs":
            for block in mlp_blocks(base):
                block.replace(ResidueMLP(block.module, part["ranks"], part["top_k"]))
            return
        self.route = Route()
        self.router = ExampleRouter(config.text_config.hidden_size, num_experts, part["pool"])
        # The base model is run by the router too; in a list it is no part of this module.
        self._base = [base]
        tied = _tied(base)
        for path, axis in part["sites"].items():
            attach(base.get_submodule(path), num_experts, part, self.route, axis)
        if tied is not None and tied[0] in part["sites"]:
            table = base.get_submodule(tied[0])
            base.get_submodule(tied[1]).register_forward_hook(_TiedHead(table, self.route))

    def begin(self, inputs: Any) -> None:
        """Route by what the shared model makes of the prompt; later tokens keep the last gates."""
        if self.mix == "outputs":
            return
        cache = inputs.cache
        kept = getattr(cache, "residue_gates", None)
        if kept is not None and cache.get_seq_length() > 0:
            self.route.gates = kept
            return
        self.route.gates = None
        length = (inputs.input_ids if inputs.inputs_embeds is None else inputs.inputs_embeds).shape[
            1
        ]
        mask = inputs.attention_mask
        hidden = (
            self._base[0]
            .base_model(
                input_ids=inputs.input_ids,
                inputs_embeds=inputs.inputs_embeds,
                attention_mask=mask,
                position_ids=inputs.position_ids,
                use_cache=False,
            )
            .last_hidden_state
        )
        self.route.gates = self.router(hidden, None if mask is None else mask[:, -length:])
        if cache is not None:
            cache.residue_gates = self.route.gates[:, -1:]


class Route:
    """The gates [B, S, E] (or [B, 1, E]) of the pass that is running; None: the shared model."""

    gates: Tensor | None = None

    def of(self, x: Tensor, axis: int) -> Tensor | None:
        """The gates of an input whose axis `axis` are the last positions, to be broadcast."""
        if self.gates is None:
            return None
        gates = self.gates[:, -x.shape[axis] :]
        return gates if axis == 1 else gates[:, *[None] * (axis - 1)]


def rank_of(part: Mapping[str, Any], expert: int, shape: tuple[int, int]) -> int:
    """The rank that a part's options give an expert for a matrix [O, I]."""
    smaller = min(shape)
    if "share" in part:
        return math.floor(part["share"] * smaller)
    return min(int(part["ranks"][expert]), smaller)


def is_whole(rank: int, shape: tuple[int, int]) -> bool:
    """Whether a residue of that rank takes less room as a matrix [O, I] than as factors."""
    return rank * sum(shape) >= math.prod(shape)


class MatrixResidues(nn.Module):
    """The residues of all experts to one matrix [O, I]: factors, or whole where those are larger.

    `left` [O, R] and `right` [R, I] hold the factors of all experts behind one another, `whole`
    [W, O, I] the matrices of the experts in `whole_of`; each is None where there is nothing in it.
    """

    def __init__(self, shape: tuple[int, int], ranks: list[int]) -> None:
        super().__init__()
        self.shape = shape
        self.whole_of = [e for e, rank in enumerate(ranks) if is_whole(rank, shape)]
        self.ranks = [0 if e in self.whole_of else rank for e, rank in enumerate(ranks)]
        total = sum(self.ranks)
        # Nothing of size zero: files have no use for it.
        self.left = nn.Parameter(torch.zeros(shape[0], total)) if total else None
        self.right = nn.Parameter(torch.zeros(total, shape[1])) if total else None
        self.whole = (
            nn.Parameter(torch.zeros(len(self.whole_of), *shape)) if self.whole_of else None
        )
        self._expert_of = [e for e, rank in enumerate(self.ranks) for _ in range(rank)]

    def factors(self, expert: int) -> tuple[Tensor, Tensor]:
        """left [O, r] and right [r, I] of an expert that has factors."""
        assert self.left is not None
        assert self.right is not None
        start = sum(self.ranks[:expert])
        stop = start + self.ranks[expert]
        return self.left[:, start:stop], self.right[start:stop]

    def matrix(self, expert: int) -> Tensor:
        """The residue [O, I] of an expert that is kept whole."""
        assert self.whole is not None
        return self.whole[self.whole_of.index(expert)]

    def has(self, expert: int) -> bool:
        """Whether an expert has a residue at all."""
        return self.ranks[expert] > 0 or expert in self.whole_of

    def apply_one(self, expert: int, x: Tensor) -> Tensor:
        """The residue of an expert applied to x [..., I]."""
        if expert in self.whole_of:
            return linear(x, self.matrix(expert))
        left, right = self.factors(expert)
        return linear(linear(x, right), left)

    def mixed(self, x: Tensor, gates: Tensor) -> Tensor:
        """The gated sum over experts, [..., O], for x [..., I] and gates [..., E]."""
        out = x.new_zeros(*x.shape[:-1], self.shape[0])
        if self.left is not None and self.right is not None:
            out = routed_low_rank(x, self.right, self.left, self.expert_of(x), gates)
        for expert in self.whole_of:
            gate = gates[..., expert, None].to(x.dtype)
            out = out + gate * linear(x, self.matrix(expert))
        return out

    def rows_mixed(self, ids: Tensor, gates: Tensor) -> Tensor:
        """The gated sum of the rows `ids` of the residues, as an embedding has them."""
        out: Any = 0
        if self.left is not None and self.right is not None:
            inner = embedding(ids, self.left) * gates.to(self.left.dtype)[..., self.expert_of(ids)]
            out = inner @ self.right
        for expert in self.whole_of:
            rows = embedding(ids, self.matrix(expert))
            out = out + gates[..., expert, None].to(rows.dtype) * rows
        return out

    def expert_of(self, like: Tensor) -> Tensor:
        return torch.tensor(self._expert_of, dtype=torch.long, device=like.device)


class VectorResidues(nn.Module):
    """The residues of all experts to vectors of a module, whole, [E, ...] under their names.

    Added by running the module with each expert's vectors: exact for every module whose output is
    an affine function of its parameters, as norms, biases and scaled embeddings are.
    """

    def __init__(self, module: nn.Module, names: list[str], num_experts: int) -> None:
        super().__init__()
        self.num_experts, self.names = num_experts, names
        for name in names:
            shape = module.get_parameter(name).shape
            self.register_parameter(name, nn.Parameter(torch.zeros(num_experts, *shape)))
        bare = copy.copy(module)
        bare._forward_hooks = type(module._forward_hooks)()
        # In a list: it shares the module's parameters and is no part of this one.
        self._bare = [bare]

    def mixed(self, x: Tensor, output: Tensor, gates: Tensor) -> Tensor:
        """What is to be added to the module's `output` for x."""
        (bare,) = self._bare
        if isinstance(bare, nn.Linear):
            return gates.to(output.dtype) @ self.get_parameter("bias")
        own = {name: bare.get_parameter(name) for name in self.names}
        total = torch.zeros_like(output)
        for expert in range(self.num_experts):
            moved = {n: p + self.get_parameter(n)[expert] for n, p in own.items()}
            gate = gates[..., expert].to(output.dtype)
            gate = gate[(..., *[None] * (output.ndim - gate.ndim))]
            total = total + gate * (functional_call(bare, moved, (x,)) - output)
        return total


def attach(
    module: nn.Module, num_experts: int, part: Mapping[str, Any], route: Route, axis: int
) -> None:
    """Give a module of the base model residues below the name `residues`, and let them act.

    `axis` is the one of positions in the module's input.
    """
    matrix = type(module) in MATRIX_TYPES
    residues = nn.Module()
    if matrix:
        weight: Any = module.weight
        shape = (weight.shape[0], weight.shape[1])
        ranks = [rank_of(part, expert, shape) for expert in range(num_experts)]
        residues.weight = MatrixResidues(shape, ranks)
    vectors = [
        n for n, _ in module.named_parameters(recurse=False) if not (matrix and n == "weight")
    ]
    if vectors:
        residues.vectors = VectorResidues(module, vectors, num_experts)
    module.add_module("residues", residues)
    module.register_forward_hook(_Residues(route, axis))


class _Residues:
    """A hook that adds to a module's output what its residues say."""

    def __init__(self, route: Route, axis: int) -> None:
        self._route, self._axis = route, axis

    def __call__(self, module: Any, args: Any, output: Tensor) -> Tensor:
        (x,) = args
        gates = self._route.of(x, self._axis)
        if gates is None:
            return output
        residues, found = module.residues, output
        if hasattr(residues, "weight"):
            is_table = type(module) is nn.Embedding
            mix = residues.weight.rows_mixed if is_table else residues.weight.mixed
            found = found + mix(x, gates)
        if hasattr(residues, "vectors"):
            found = found + residues.vectors.mixed(x, output, gates)
        return found


class _TiedHead:
    """A hook by which an output head tied to the embedding has the embedding's residues."""

    def __init__(self, table: Any, route: Route) -> None:
        self._table, self._route = table, route

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        (x,) = args
        gates = self._route.of(x, 1)
        if gates is None:
            return output
        residues = self._table.residues
        if hasattr(residues, "weight"):
            return output + residues.weight.mixed(x, gates)
        total = torch.zeros_like(output)
        for expert in range(residues.vectors.num_experts):
            matrix = residues.vectors.get_parameter("weight")[expert]
            total = total + gates[..., expert, None].to(output.dtype) * linear(x, matrix)
        return output + total


def _tied(base: PreTrainedModel) -> tuple[str, str] | None:
    """The paths of the embedding and of the head tied to it."""
    if not base.config.get_text_config(decoder=True).tie_word_embeddings:
        return None
    paths = {id(module): path for path, module in base.named_modules()}
    head = base.get_output_embeddings()
    return paths[id(base.get_input_embeddings())], paths[id(head)]


class ResidueMLP(nn.Module):
    """A feed-forward block whose experts are itself plus a residue to each projection.

    Expert 0 is the shared block, without a residue. gate and up of the shared block are computed
    once a token for all its chosen experts; down is not shared, for its input differs.
    """

    def __init__(self, dense: Any, ranks: list[int], top_k: int) -> None:
        super().__init__()
        self.num_experts, self.top_k = len(ranks), top_k
        self.residues = nn.ModuleDict()
        for name in PROJECTIONS:
            linear_: nn.Linear = getattr(dense, name)
            self.add_module(name, linear_)
            shape = (linear_.out_features, linear_.in_features)
            self.residues[name] = MatrixResidues(shape, [min(r, *shape) for r in ranks])
        self.act_fn = dense.act_fn
        self.router = TokenRouter(dense.gate_proj.in_features, self.num_experts)

    def forward(self, hidden_states: Tensor) -> Tensor:
        rows = hidden_states.flatten(0, -2)
        weights, ids = self.router(rows).topk(self.top_k, -1)
        gate, up = (self._shared(name, rows) for name in ("gate_proj", "up_proj"))
        total = torch.zeros_like(rows)
        for expert in ids.unique().tolist():
            token, choice = (ids == expert).nonzero(as_tuple=True)
            out = self.expert(expert, rows[token], gate[token], up[token])
            out = out * weights[token, choice, None].to(out.dtype)
            total = total.index_add(0, token, out)
        return total.view_as(hidden_states)

    def expert(self, expert: int, x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        """What an expert makes of x [n, D], given what the shared gate and up make of it [n, F]."""
        gate = self._own("gate_proj", expert, x, gate)
        up = self._own("up_proj", expert, x, up)
        inner = self.act_fn(gate) * up
        return self._own("down_proj", expert, inner, self._shared("down_proj", inner))

    def _shared(self, name: str, x: Tensor) -> Tensor:
        projected: Tensor = self.get_submodule(name)(x)
        return projected

    def _own(self, name: str, expert: int, x: Tensor, shared: Tensor) -> Tensor:
        residues: Any = self.residues[name]
        return shared + residues.apply_one(expert, x) if residues.has(expert) else shared
