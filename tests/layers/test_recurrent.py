"""RMoE: the checks of its method section."""

import pytest
import torch

from moekit.layers import RouterContext, build_router

D, E, K, T, Q = 16, 4, 2, 12, 8


def stack(layers: int = 3, **options) -> torch.nn.ModuleList:
    torch.manual_seed(0)
    routers = [build_router("rmoe", D, E, K, state_width=Q, **options) for _ in range(layers)]
    shared = torch.nn.ModuleDict()
    for router in routers:
        router.score.share(shared)
    return torch.nn.ModuleList([*routers, shared])


def run(routers, seeds=(0, 1, 2)):
    """The routings of the stack; every layer has hidden states of its own."""
    context, out = RouterContext(1, T), []
    for layer, seed in enumerate(seeds):
        context = context.enter(layer)
        x = torch.randn(T, D, generator=torch.Generator().manual_seed(seed))
        out.append(routers[layer](x, context))
    return out


def test_one_cell_serves_all_layers_and_is_counted_once():
    routers = stack()
    cells = {id(routers[layer].score.cell) for layer in range(3)}
    assert len(cells) == 1
    cell = 3 * Q * 2 * (Q + 1)
    own = D * Q + E * Q
    assert sum(param.numel() for param in routers.parameters()) == 3 * own + cell
    assert sum(value.numel() for value in routers.state_dict().values()) == 3 * own + cell


def test_the_projection_of_the_layer_before_changes_the_route():
    routers = stack()
    before = run(routers)[1].logits
    with torch.no_grad():
        routers[0].score.projection.add_(1.0)
    assert not torch.equal(run(routers)[1].logits, before)


@pytest.mark.parametrize(("recurrence", "reached"), [("full", 1), ("detached", 0), ("none", 0)])
def test_a_loss_of_the_last_router_reaches_the_first_projection(recurrence, reached):
    routers = stack(recurrence=recurrence)
    run(routers)[-1].logits.square().sum().backward()
    gradient = routers[0].score.projection.grad
    assert (gradient is not None and bool(gradient.any())) == bool(reached)


def test_without_recurrence_the_parameters_are_as_many_and_the_layers_independent():
    full, none = stack(), stack(recurrence="none")
    count = [sum(param.numel() for param in routers.parameters()) for routers in (full, none)]
    assert count[0] == count[1]
    before = run(none)[1].logits
    with torch.no_grad():
        none[0].score.projection.add_(1.0)
    assert torch.equal(run(none)[1].logits, before)
    # The first layer knows no layer before it in either.
    assert torch.equal(run(full)[0].logits, run(stack(recurrence="none"))[0].logits)


def test_the_cell_is_torchs():
    router = build_router("rmoe", D, E, K, state_width=Q)
    reference = torch.nn.GRUCell(Q, Q)
    cell = router.score.cell
    reference.weight_ih, reference.weight_hh = cell.weight_in, cell.weight_state
    reference.bias_ih, reference.bias_hh = cell.bias_in, cell.bias_state
    x, state = torch.randn(T, Q), torch.randn(T, Q)
    assert torch.equal(cell(x, state), reference(x, state))


def test_layers_share_information_about_a_token_only_through_the_state():
    """Mutual information of two layers' first choices: above the layers' own with the state."""

    def shared_information(recurrence: str) -> float:
        routers = stack(2, recurrence=recurrence)
        with torch.no_grad():
            for router in routers[:2]:
                router.score.weight.mul_(5)
        tokens = 4000
        context = RouterContext(1, tokens)
        choices = []
        for layer in range(2):
            context = context.enter(layer)
            x = torch.randn(tokens, D, generator=torch.Generator().manual_seed(layer))
            choices.append(routers[layer](x, context).topk()[0][:, 0])
        joint = torch.zeros(E, E).index_put(
            tuple(choices), torch.full((tokens,), 1 / tokens), accumulate=True
        )
        product = joint.sum(1, keepdim=True) * joint.sum(0)
        return float(torch.xlogy(joint, joint / product.clamp_min(1e-12)).sum())

    # Independent choices of 4000 tokens leave about (E - 1)^2 / (2 * 4000) = 0.001 by chance.
    assert shared_information("full") > 0.01 > shared_information("none")
