"""MoTE: ternary experts beside the dense block, trained a little, and packed."""

import pytest
import torch

from moekit.core.errors import UserError
from moekit.core.view import MoEView
from moekit.ops.straight_through import int8_rows, ternary_weight
from moekit.upcycle.model.ternary import TernaryBlock
from moekit.upcycle.run import Request, upcycle
from tests.upcycle.dense_models import logits, read, tokens


def run(out, method, base, data=(), check=False, **options):
    return upcycle(Request(method, str(base), (), options, data=data), out, check=check)


def blocks(model):
    return [m for m in model.modules() if isinstance(m, TernaryBlock)]


def test_experts_that_add_nothing_leave_the_source(family_of_models, tmp_path):
    result = run(tmp_path / "mote", "mote", family_of_models["base"], preserve=True, check=True)
    assert result.measured == 0
    assert result.start.equal_to == "the source"
    assert torch.equal(
        logits(read(tmp_path / "mote"), tokens()), logits(read(family_of_models["base"]), tokens())
    )


def test_a_copy_is_added_by_its_probability(family_of_models, tmp_path):
    result = run(tmp_path / "mote", "mote", family_of_models["base"], layers="1")
    assert result.start.equal_to is None
    model = read(tmp_path / "mote")
    (block,) = blocks(model)
    x = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        weight, chosen = (x[0] @ block.gate.weight.T).softmax(-1).max(-1)
        made = block(x)[0]
        for t, expert in enumerate(chosen.tolist()):
            gate, up = ternary_weight(block.experts.gate_up_proj[expert].unflatten(0, (2, -1)))
            down = ternary_weight(block.experts.down_proj[expert])
            row = int8_rows(x[0, t : t + 1])
            inner = int8_rows(torch.nn.functional.silu(row @ gate.T) * (row @ up.T))
            expected = block.shared_expert(x[0, t]) + weight[t] * (inner @ down.T)[0]
            torch.testing.assert_close(made[t], expected, rtol=1e-5, atol=1e-5)


def test_matrices_have_three_values_each(family_of_models, tmp_path):
    run(tmp_path / "mote", "mote", family_of_models["base"])
    for block in blocks(read(tmp_path / "mote")):
        gate_up, down = block.experts.matrices(1)
        for matrix in (*gate_up, down):
            scale = matrix.abs().max()
            assert torch.equal(matrix.detach().unique(), torch.stack([-scale, 0 * scale, scale]))


def test_training_moves_experts_and_routers_alone_and_lowers_the_loss(family_of_models, tmp_path):
    base, data = family_of_models["base"], (str(family_of_models["texts"]),)
    result = run(
        tmp_path / "mote", "mote", base, data=data, steps=25, learning_rate=5e-3, experts=2
    )
    assert result.numbers["last_loss"] < 0.9 * result.numbers["first_loss"]
    run(tmp_path / "start", "mote", base, experts=2)
    before, after = (read(tmp_path / n).state_dict() for n in ("start", "mote"))
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved
    assert all(".mlp.experts." in name or ".mlp.gate." in name for name in moved)


def test_packed_experts_compute_the_same_in_less_room(family_of_models, tmp_path):
    run(tmp_path / "mote", "mote", family_of_models["base"])
    result = run(tmp_path / "packed", "pack-ternary", tmp_path / "mote", check=True)
    assert result.measured <= result.start.tolerance
    sizes = {
        name: sum(
            tensor.numel() * tensor.element_size()
            for key, tensor in read(tmp_path / name).state_dict().items()
            if ".experts." in key
        )
        for name in ("mote", "packed")
    }
    # Five weights a byte instead of one in four bytes, and a scale a matrix.
    assert sizes["packed"] < sizes["mote"] / 17
    with pytest.raises(UserError, match="packed already"):
        run(tmp_path / "twice", "pack-ternary", tmp_path / "packed")


def test_its_experts_are_seen(family_of_models, tmp_path):
    run(tmp_path / "mote", "mote", family_of_models["base"], layers="every-second", experts=3)
    view = MoEView(read(tmp_path / "mote"))
    assert [(layer.num_experts, layer.top_k) for layer in view] == [(3, 1)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"experts": 1}, "2 or more"),
        ({"steps": 5}, "both --data and mote:steps"),
        ({"layers": "9"}, "layers 0 to 1"),
    ],
)
def test_wrong_options(family_of_models, tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        run(tmp_path / "mote", "mote", family_of_models["base"], **options)
