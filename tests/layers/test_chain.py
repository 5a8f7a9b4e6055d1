"""Chain of experts: the checks of its method section."""

import copy

import pytest
import torch

from moekit.core.errors import UserError
from moekit.layers import ExpertPool, MoELayer, RouterContext, build_bank, build_router
from moekit.layers.chain import ChainLayer, RouterChain
from moekit.layers.config import MoekitConfig
from moekit.layers.model import MoekitForCausalLM

D, E, T = 16, 6, 20


def hidden() -> torch.Tensor:
    return torch.randn(1, T, D, generator=torch.Generator().manual_seed(0))


def pool() -> ExpertPool:
    torch.manual_seed(1)
    made = ExpertPool([build_bank("swiglu", D, E, expert_width=8)])
    with torch.no_grad():
        for param in made.parameters():
            param.normal_(std=0.3)
    return made


def routers(count: int, top_k: int = 2, name: str = "softmax-raw") -> list[torch.nn.Module]:
    torch.manual_seed(2)
    made = [build_router(name, D, E, top_k) for _ in range(count)]
    with torch.no_grad():
        for router in made:
            router.score.weight.normal_()
    return made


def chain(count: int, top_k: int = 2, **options) -> ChainLayer:
    return ChainLayer(RouterChain(routers(count, top_k), count), pool(), **options)


def test_one_round_is_the_plain_layer():
    plain = MoELayer(routers(1)[0], pool())
    assert torch.equal(chain(1)(hidden()), plain(hidden()))


def test_two_rounds_are_two_layers_with_a_residual_between():
    layer = chain(2)
    first = MoELayer(layer.router[0], layer.pool)(hidden())
    second = MoELayer(layer.router[1], layer.pool)(hidden() + first)
    assert torch.equal(layer(hidden()), first + second)


def test_the_second_route_depends_on_the_first_rounds_experts():
    layer = chain(2, top_k=1)
    context = RouterContext(1, T)
    layer(hidden(), context)
    before = context.records[1].logits
    expert = int(context.records[0].expert[0])
    with torch.no_grad():
        layer.pool.banks[0].down_proj[expert].add_(1.0)
    again = RouterContext(1, T)
    layer(hidden(), again)
    touched = context.records[0].expert == expert
    changed = (again.records[1].logits != before).any(1)
    assert torch.equal(changed, touched)


def test_calls_of_experts_are_rounds_times_top_k():
    context = RouterContext(1, T)
    chain(3, top_k=2)(hidden(), context)
    assert [record.round for record in context.records] == [0, 1, 2]
    assert sum(int(record.counts().sum()) for record in context.records) == T * 6


def test_rounds_draw_by_themselves():
    layer = ChainLayer(RouterChain([build_router("random", D, E, 1) for _ in range(2)], 2), pool())
    context = RouterContext(1, T, training=True)
    layer(hidden(), context)
    assert not torch.equal(context.records[0].expert, context.records[1].expert)


def test_norms_and_tied_routers():
    layer = chain(2, norm_width=D)
    assert len(layer.norms) == 1
    assert not torch.equal(layer(hidden()), chain(2)(hidden()))
    tied = RouterChain(routers(1), 3)
    assert tied[0] is tied[2]
    assert len(list(tied.parameters())) == 1


MOE = {
    "router": {"name": "softmax-raw"},
    "top_k": 1,
    "rounds": {"count": 2, "norm": True},
    "experts": {"type": "swiglu", "count": 4, "expert_width": 16},
    "shared": {"expert_width": 16},
}


def config(**changes) -> MoekitConfig:
    return MoekitConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        moe={**copy.deepcopy(MOE), **changes},
    )


def test_a_model_of_chains_counts_by_round_and_moves_the_rounds_biases():
    torch.manual_seed(0)
    model = MoekitForCausalLM(config(router={"name": "loss-free", "bias_rate": 0.1}, top_k=2))
    routings = model(torch.arange(12).view(2, 6)).routings
    assert [(r.layer, r.round) for r in routings] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    counts = [torch.tensor([6.0, 2, 2, 2]).roll(shift) for shift in range(4)]
    model.after_step(routings, counts)
    biases = [name for name, _ in model.named_buffers() if name.endswith("expert_bias")]
    lowered = [int(model.get_buffer(name).argmin()) for name in sorted(biases)]
    assert lowered == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("rounds", "message"),
    [(0, "moe.rounds is 0"), ({"cuont": 2}, "did you mean 'count'")],
)
def test_bad_rounds_are_told(rounds, message):
    with pytest.raises(UserError, match=message):
        config(rounds=rounds).layer_recipes()
