"""What the benchmark of a GPU's experts does before it times anything, without a GPU."""

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import gpu_experts
from tests.ops.triton.conftest import products_of_bfloat16

__all__ = ["products_of_bfloat16"]

SHAPE = (64, 32, 2, 4)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("codec", ["int4", "bf16"])
def test_wrong_results_stop_it(codec):
    layer = gpu_experts.Layer(codec, SHAPE, DEVICE)
    gpu_experts.check(layer, SHAPE, DEVICE)
    layer.weights["down"] = layer.weights["down"].roll(1, 0)
    with pytest.raises(SystemExit, match="nothing was timed"):
        gpu_experts.check(layer, SHAPE, DEVICE)


def test_transformers_runs_the_same_inputs():
    experts = gpu_experts.transformers_layer(SHAPE)
    hidden, ids, weights = gpu_experts.drawn(5, SHAPE, "cpu")
    with torch.inference_mode():
        out = experts(hidden, ids, weights)
    assert (out.shape, out.dtype) == (hidden.shape, torch.bfloat16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_does_nothing_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpu_experts.py"])
    gpu_experts.main()
    assert "nothing was measured" in capsys.readouterr().out
