"""The compiled kernels for training beside the loop on a CPU, in float64."""

import pytest
import torch

pytest.importorskip("triton")

from moekit.ops.grouped import ragged_experts
from tests.ops.test_grouped import results

# Rounding of hidden, middle and rows; float32 sums in another order.
TOLERANCE = {torch.bfloat16: 0.02, torch.float16: 0.005, torch.float32: 1e-5}
TOKENS, WIDTH, INNER, EXPERTS = 300, 200, 120, 16


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("pairs", [0, 1, 1000])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_outputs_and_gradients(dtype, pairs, gated):
    draw = torch.Generator().manual_seed(pairs)
    token = torch.randint(TOKENS, (pairs,), generator=draw)
    # The last experts get nothing.
    expert = torch.randint(EXPERTS - 3, (pairs,), generator=draw)
    shapes = [(TOKENS, WIDTH), (pairs,), (EXPERTS, (1 + gated) * INNER, WIDTH)]
    shapes.append((EXPERTS, WIDTH, INNER))
    hidden, weight, up, down = (0.3 * torch.randn(*s, generator=draw) for s in shapes)
    arguments = (hidden, token, expert, weight, up, down)
    half = tuple(x.to(dtype) if x.is_floating_point() else x for x in arguments)
    exact = tuple(x.double() if x.is_floating_point() else x for x in half)
    found = results(ragged_experts, tuple(x.cuda() for x in half), gated=gated)
    for ours, expected in zip(found, results(ragged_experts, exact, gated=gated), strict=True):
        error = (ours.cpu().double() - expected).norm()
        assert error <= TOLERANCE[dtype] * expected.norm()
