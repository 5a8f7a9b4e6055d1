"""The measured size of a cache: what it really takes, in windows, states and blocks."""

import pytest
import torch

from moekit.runtime.cache_size import _tensor_bytes
from moekit.runtime.graph_runner import GraphRunner
from tests.families.tiny import build_tiny


@pytest.mark.parametrize(
    ("family", "exact"),
    [
        ("qwen3_moe", True),
        ("deepseek_v3", True),
        ("jamba", True),
        ("qwen3_next", True),
        ("minimax", True),
        # A window of w keeps w - 1 tokens.
        ("gpt_oss", False),
        ("mixtral", False),
        # Tokens are gathered in blocks before they are compressed.
        ("deepseek_v4", False),
    ],
)
def test_size_is_that_of_a_real_cache(family, exact):
    runner = GraphRunner(build_tiny(family))
    ids = torch.randint(3, 120, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    seq = runner.new_sequence(128)
    runner.forward([seq], [ids[:60]])
    for token in ids[60:]:
        runner.forward([seq], [[token]])
    held = sum(_tensor_bytes(seq.cache))
    planned = runner.cache_size.nbytes(100)
    assert planned == held if exact else held <= planned
    assert runner.kv_bytes_per_token > 0
