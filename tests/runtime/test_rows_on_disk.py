"""The embedding on disk: the same bits, fewer bytes, and damage is found whenever it happens."""

import numpy as np
import pytest
import torch

import moekit
from moekit.core.pack import pack
from moekit.ops.native import library
from moekit.runtime import rows_on_disk
from moekit.runtime.native_runner import NativeRunner
from moekit.runtime.rows_on_disk import RowsOnDisk
from moekit.runtime.store import ExpertStore, StoreError
from tests.families.tiny import TINY, build_tiny

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler")

# 3,000 rows of 128 bytes, the last block of them not full.
VOCAB, NAME = 3000, "model.embed_tokens.weight"


@pytest.fixture
def packed(tmp_path):
    config = TINY["qwen3_moe"]()
    config.vocab_size = VOCAB
    model = build_tiny("qwen3_moe", config=config)
    model.save_pretrained(tmp_path / "m")
    pack(tmp_path / "m", tmp_path / "p", codec="fp32")
    return model, tmp_path / "p"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(rows_on_disk, "BLOCK_BYTES", 1000)


def test_rows_are_those_of_the_tensor(packed):
    model, path = packed
    table = model.get_input_embeddings().weight.detach()
    with ExpertStore.open(path) as store:
        rows = RowsOnDisk(store, NAME, most=8)
        for ids in ([2999], [0], [5, 5, 2998, 6, 7, 120, 14, 0]):
            rows.fetch(np.array(ids))
            assert torch.equal(rows.table[: len(ids)], table[ids])
        assert rows.nbytes < 8 * 128 + 4 * VOCAB
        rows.close()


def test_logits_are_the_same_bits(packed):
    _, path = packed
    ids = [5, 9, 2, 2999, 7, 7, 61, 130]
    with ExpertStore.open(path) as store:
        found = []
        for on_disk in (False, True):
            runner = NativeRunner(store, embedding_on_disk=on_disk, max_rows=3)
            sequence = runner.new_sequence(16)
            prompt = runner.forward([sequence], [ids], all_positions=True)[0]
            found.append((prompt, runner.forward([sequence], [[250]]), runner.resident_bytes))
            runner.close()
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    # Without the table, but with room for the rows of a step and the checksums.
    assert found[1][2] <= found[0][2] - VOCAB * 128 + 3 * 128 + 8192


def test_only_where_experts_stay_on_disk_too(packed):
    _, path = packed
    with moekit.open_engine(path, streams=1) as engine:
        assert engine.runner.weights.rows is None
        whole, expected = engine.budget, engine.generate([[5, 9, 2999]], 4)
    with moekit.open_engine(path, expert_cache=whole.all_experts // 2, streams=1) as engine:
        assert engine.runner.weights.rows is not None
        assert engine.budget.needs.resident < whole.needs.resident
        assert engine.generate([[5, 9, 2999]], 4) == expected


def test_a_tied_embedding_stays_in_memory(tmp_path):
    config = TINY["granitemoe"]()
    config.tie_word_embeddings = True
    build_tiny("granitemoe", config=config).save_pretrained(tmp_path / "m")
    pack(tmp_path / "m", tmp_path / "p", codec="fp32")
    with ExpertStore.open(tmp_path / "p") as store:
        assert NativeRunner(store, embedding_on_disk=True).weights.rows is None


def flip(path, name):
    """Change a byte in the middle of a tensor."""
    with ExpertStore.open(path) as store:
        record = store._records[name]
    with (path / record.file).open("r+b") as file:
        file.seek(record.offset + record.size // 2)
        byte = file.read(1)[0]
        file.seek(record.offset + record.size // 2)
        file.write(bytes([byte ^ 1]))


def test_damage_before_and_after_opening(packed):
    _, path = packed
    with ExpertStore.open(path) as store:
        rows = RowsOnDisk(store, NAME, most=2)
        flip(path, NAME)
        rows.fetch(np.array([3, 2900]))
        with pytest.raises(StoreError, match=rf"{NAME} have changed since it was opened"):
            rows.fetch(np.array([3, 1500]))
        rows.close()
        with pytest.raises(StoreError, match="is damaged: its checksum"):
            RowsOnDisk(store, NAME, most=2)


def test_the_refusal_is_an_error_of_the_step(packed):
    _, path = packed
    with ExpertStore.open(path) as store:
        runner = NativeRunner(store, embedding_on_disk=True)
        flip(path, NAME)
        sequence = runner.new_sequence(4)
        with pytest.raises(StoreError, match="have changed"):
            runner.forward([sequence], [[1500]])
        assert sequence.length == 0
