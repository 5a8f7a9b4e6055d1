"""Claims that need a trained model, on text of four synthetic domains: EMO and ElasticMoE."""

import pytest
import torch

from moekit.layers import MoekitConfig, MoekitForCausalLM, RouterContext

VOCAB, LENGTH, BATCH, DOMAINS, E = 64, 32, 16, 4, 16
# In every domain each token has two successors, each as likely; the tokens are the same.
SUCCESSORS = torch.randint(VOCAB, (DOMAINS, VOCAB, 2), generator=torch.Generator().manual_seed(0))


def text(seed: int, domain: int | None = None, count: int = BATCH) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    domains = torch.randint(DOMAINS, (count,), generator=generator)
    if domain is not None:
        domains = torch.full((count,), domain)
    ids = torch.randint(VOCAB, (count, LENGTH), generator=generator)
    pick = torch.randint(2, (count, LENGTH), generator=generator)
    for place in range(1, LENGTH):
        ids[:, place] = SUCCESSORS[domains, ids[:, place - 1], pick[:, place]]
    return ids


def build(router: dict, top_k: int, experts: int = E) -> MoekitForCausalLM:
    torch.manual_seed(0)
    config = MoekitConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        moe={
            "router": router,
            "top_k": top_k,
            "experts": {"type": "swiglu", "count": experts, "expert_width": 16},
        },
    )
    return MoekitForCausalLM(config)


def trained(router: dict, top_k: int, balance: float, steps: int = 150) -> MoekitForCausalLM:
    model = build(router, top_k).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(steps):
        ids = text(1000 + step)
        output = model(ids, labels=ids, router_context=RouterContext(1, 1, step=step))
        loss = output.loss
        for routing in output.routings:
            share = routing.counts() / routing.counts().sum()
            loss = loss + balance * E * (share * routing.scores.mean(0)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.after_step(output.routings, [r.counts() for r in output.routings])
    return model.eval()


@torch.no_grad()
def loss_of(model: MoekitForCausalLM, domain: int | None = None) -> float:
    ids = text(99, domain, 64)
    return float(model(ids, labels=ids).loss)


@torch.no_grad()
def cut(model: MoekitForCausalLM, domain: int, keep: int) -> MoekitForCausalLM:
    """`model` with the `keep` experts of each layer that the domain's text likes best."""
    likes = [routing.scores.mean(0) for routing in model(text(5, domain, 64)).routings]
    part, whole = build({"name": "softmax-raw"}, 2, keep).eval(), model.state_dict()
    for name, value in part.state_dict().items():
        source = whole.get(name, whole.get(name.replace(".score.", ".score.linear.")))
        if ".mlp." in name:
            best = likes[int(name.split(".")[2])].topk(keep).indices
            source = source[best]
        value.copy_(source)
    return part


@pytest.mark.slow
def test_document_pools_let_a_domains_experts_stand_alone():
    plain = trained({"name": "softmax-raw"}, 2, balance=0.05)
    pooled = trained({"name": "emo", "smallest_pool": 2}, 2, balance=0.05)
    for domain in range(DOMAINS):
        alone = {id(m): loss_of(cut(m, domain, 4), domain) for m in (plain, pooled)}
        lost = {id(m): alone[id(m)] - loss_of(m, domain) for m in (plain, pooled)}
        # A quarter of the experts: 0.2 to 0.4 nats lost without pools, gained with them.
        assert lost[id(pooled)] < 0 < lost[id(plain)]
        assert alone[id(pooled)] < alone[id(plain)]


@pytest.mark.slow
def test_a_small_top_k_costs_less_after_elastic_training():
    gaps = []
    for options in ({"top_ks": [1, 4], "full": 0.5}, {"top_ks": [4], "full": 1.0}):
        router = {"name": "elastic", "experts": [E], **options}
        model = trained(router, 4, balance=0.0)
        small = build({**router, "eval_top_k": 1}, 4).eval()
        small.load_state_dict(model.state_dict())
        gaps.append(loss_of(small) - loss_of(model))
    # 0.03 nats against 0.05 to 0.09 over seeds.
    assert gaps[0] < gaps[1]
