"""Stick-breaking attention against its definition, one product at a time."""

import torch

from moekit.ops.stick_breaking import stick_breaking_attention, stick_breaking_weights


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_definition(logits: torch.Tensor) -> torch.Tensor:
    share = logits.double().sigmoid()
    weights = torch.zeros_like(share)
    for i in range(len(share)):
        left = 1.0
        for j in range(i, -1, -1):
            weights[i, j] = share[i, j] * left
            left = left * (1 - share[i, j])
    return weights


def test_weights_equal_the_definition() -> None:
    logits = random(7, 7)
    # float32 logarithms against float64 products.
    torch.testing.assert_close(
        stick_breaking_weights(logits).double(), by_definition(logits), rtol=1e-5, atol=1e-7
    )


def test_a_row_sums_to_what_has_been_broken_off() -> None:
    logits = random(2, 3, 9, 9, seed=1).double()
    visible = torch.ones(9, 9).tril().bool()
    left = (1 - logits.sigmoid()).where(visible, torch.ones_like(logits)).prod(-1)
    torch.testing.assert_close(stick_breaking_weights(logits).sum(-1), 1 - left)


def test_certain_queries_attend_to_themselves_alone() -> None:
    weights = stick_breaking_weights(torch.full((5, 5), 60.0))
    torch.testing.assert_close(weights, torch.eye(5))


def test_attention_does_not_see_the_future_and_gradients_are_finite() -> None:
    query, key, value = (random(1, 2, 6, 4, seed=s).requires_grad_() for s in (0, 1, 2))
    out = stick_breaking_attention(query, key, value)
    out[:, :, :3].sum().backward()
    assert key.grad is not None
    assert value.grad is not None
    assert torch.all(key.grad[:, :, 3:] == 0)
    assert torch.all(value.grad[:, :, 3:] == 0)
    assert key.grad.isfinite().all()


def test_masked_keys_are_as_if_they_were_not_there() -> None:
    query, key, value = (random(1, 2, 6, 4, seed=s) for s in (3, 4, 5))
    mask = torch.tensor([[True, True, False, True, False, True]])
    kept = mask[0].nonzero().flatten()
    expected = stick_breaking_attention(*(part[:, :, kept] for part in (query, key, value)))
    made = stick_breaking_attention(query, key, value, mask)[:, :, kept]
    # The same sums with zeros among them.
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-6)
