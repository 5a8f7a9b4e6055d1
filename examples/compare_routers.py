"""Which router learns faster: python examples/compare_routers.py ROUTER ROUTER ... [STEPS]

Trains one small model with each router, on the same made-up text with the same start and the same
active parameters, and prints the loss of the last steps and the largest load over the mean.
"""

import sys

import torch

from moekit.layers import MoekitConfig, MoekitForCausalLM, RouterContext

VOCABULARY, LENGTH, BATCH, LAST = 64, 64, 16, 10


def make_text(step: int, table: torch.Tensor) -> torch.Tensor:
    """Ids [B, S] of a chain in which the last token decides about four possible next ones."""
    draw = torch.Generator().manual_seed(step)
    ids = [torch.randint(VOCABULARY, (BATCH,), generator=draw)]
    for _ in range(LENGTH - 1):
        ids.append(table[ids[-1], torch.randint(4, (BATCH,), generator=draw)])
    return torch.stack(ids, 1)


def build(router: str) -> MoekitForCausalLM:
    torch.manual_seed(0)
    config = MoekitConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        moe={
            "router": router,
            "top_k": 2,
            "experts": {"type": "swiglu", "count": 8, "expert_width": 32},
        },
    )
    return MoekitForCausalLM(config).train()


def train(router: str, steps: int) -> tuple[float, float]:
    """Mean loss of the last steps, and the largest load of an expert over the mean then."""
    table = torch.randint(VOCABULARY, (VOCABULARY, 4), generator=torch.Generator().manual_seed(1))
    model = build(router)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses, loads = [], 0
    for step in range(steps):
        ids = make_text(step, table)
        output = model(ids, labels=ids, router_context=RouterContext(BATCH, LENGTH, step=step))
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        counts = [routing.counts() for routing in output.routings]
        model.after_step(output.routings, counts)
        losses.append(output.loss.item())
        loads += torch.stack(counts) if step >= steps - LAST else 0
    imbalance = (loads.amax(1) / loads.mean(1)).max()
    return sum(losses[-LAST:]) / LAST, float(imbalance)


def main(*arguments: str) -> dict[str, tuple[float, float]]:
    *routers, steps = arguments if arguments[-1].isdigit() else (*arguments, "200")
    results = {router: train(router, int(steps)) for router in routers}
    for router, (loss, imbalance) in results.items():
        print(f"{router}: loss {loss:.3f}, largest load over the mean {imbalance:.2f}")
    return results


if __name__ == "__main__":
    main(*sys.argv[1:])
