"""Operations on tensors that are not loaded: same values, and only the needed bytes are read."""

import itertools

import pytest
import torch

from moekit.core.deferred import Deferred

BANK = torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(0))


def defer(tensor, log=None):
    def read(region):
        if log is not None:
            log.append(region)
        return tensor[tuple(slice(start, stop) for start, stop in region)]

    return Deferred(tensor.shape, tensor.dtype, read)


OPERATIONS = {
    "cat of stacks": lambda t: torch.cat([torch.stack([t, t]), torch.stack([t, -t])], dim=2),
    "stack at the end": lambda t: torch.stack([t, t], dim=-1),
    "cat of unequal": lambda t: torch.cat([t[:1], t, t[:2]], dim=0),
    "cat of two dtypes": lambda t: torch.cat([t, t.double()], dim=1),
    "transpose": lambda t: t.transpose(1, 2).contiguous(),
    "transpose of the first axis": lambda t: t.transpose(0, -1),
    "mT": lambda t: t.mT,
    "t": lambda t: t[0].t(),
    "permute": lambda t: t.permute(2, 0, 1),
    "chunk and squeeze": lambda t: torch.chunk(t, 3, dim=0)[1].squeeze(0),
    "squeeze of nothing": lambda t: t.squeeze(1),
    "chunk the width": lambda t: torch.chunk(t, 2, dim=1)[1].contiguous(),
    "split by sizes": lambda t: torch.split(t, [1, 7], dim=1)[1],
    "unbind": lambda t: t.unbind(0)[2],
    "unbind the last axis": lambda t: t.unbind(-1)[2],
    "interleave": lambda t: t.reshape(3, 4, 2, 6).transpose(1, 2).reshape(3, 8, 6).contiguous(),
    "flatten": lambda t: t.flatten(),
    "view": lambda t: t.view(-1, 6),
    "view across rows": lambda t: t.view(9, 16),
    "rope": lambda t: t.view(6, 2, 2, 6).transpose(1, 2).reshape(24, 6),
    "unsqueeze": lambda t: t.unsqueeze(1),
    "select": lambda t: t[1],
    "select from the end": lambda t: t[:, -1],
    "slice": lambda t: t[1:, 2:5],
    "slice with steps": lambda t: t[::2],
    "all": lambda t: t[...],
    "index_select": lambda t: t.index_select(0, torch.tensor([2, 0, 1, 2])),
    "index_select of nothing": lambda t: t.index_select(0, torch.tensor([], dtype=torch.long)),
    "index": lambda t: t[[2, 0]],
    "cast": lambda t: t.to(torch.bfloat16),
    "arithmetic": lambda t: t * 2 + t,
    "scalar": lambda t: t.sum(),
    "clone and detach": lambda t: t.detach().clone(),
    "parameter": lambda t: torch.nn.Parameter(t, requires_grad=False),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_same_values_in_every_block(name):
    expected = OPERATIONS[name](BANK)
    deferred = OPERATIONS[name](defer(BANK))
    assert isinstance(deferred, Deferred)
    assert deferred.shape == expected.shape
    assert deferred.dtype == expected.dtype
    assert torch.equal(deferred.read(), expected)
    ranges = ([(0, min(1, size)), (min(1, size), size), (0, size)] for size in expected.shape)
    for region in itertools.product(*ranges):
        wanted = expected[tuple(slice(start, stop) for start, stop in region)]
        assert torch.equal(deferred.read(region), wanted), region


def test_one_row_of_a_fused_bank_reads_one_expert():
    gates, ups = ([torch.randn(4, 6) for _ in range(5)] for _ in range(2))
    log = []
    bank = torch.cat(
        [torch.stack([defer(t, log) for t in part]) for part in (gates, ups)], dim=1
    ).transpose(1, 2)
    row = bank.rows(3, 4)
    assert torch.equal(row[0], torch.cat([gates[3], ups[3]]).T)
    assert log == [((0, 4), (0, 6))] * 2


def test_one_expert_of_a_bank_reads_its_own_half():
    log = []
    gate = torch.chunk(defer(BANK, log), 2, dim=1)[0]
    expert = torch.chunk(gate, 3, dim=0)[2].squeeze(0)
    assert torch.equal(expert.read(), BANK[2, :4])
    assert log == [((2, 3), (0, 4), (0, 6))]


def test_neighbours_are_selected_together():
    log = []
    kept = defer(BANK, log).index_select(0, torch.tensor([1, 2]))
    assert torch.equal(kept.read(), BANK[1:])
    assert log == [((1, 3), (0, 8), (0, 6))]


def test_a_reshaped_row_reads_the_rows_it_lies_in():
    log = []
    row = defer(BANK, log).view(9, 16).rows(3, 4)
    assert torch.equal(row, BANK.view(9, 16)[3:4])
    assert log == [((1, 2), (0, 8), (0, 6))]


@pytest.mark.parametrize(("piece_bytes", "rows"), [(1, 1), (200, 1), (400, 2), (10**6, 3)])
@pytest.mark.parametrize("first", [0, 1, 3])
def test_pieces(piece_bytes, rows, first):
    pieces = list(defer(BANK).pieces(first, piece_bytes))
    assert [start for start, _ in pieces] == list(range(first, 3, rows))
    joined = torch.cat([BANK[:first], *(piece for _, piece in pieces)])
    assert torch.equal(joined, BANK)
    assert all(len(piece) <= rows for _, piece in pieces)


def test_pieces_of_scalars_and_empty_tensors():
    assert [(start, piece.item()) for start, piece in defer(torch.tensor(2.0)).pieces()] == [(0, 2)]
    assert list(defer(torch.zeros(0, 3)).pieces()) == []


@pytest.mark.parametrize("operation", [lambda t: t.add_(1), lambda t: t.topk(2)])
def test_what_cannot_be_deferred_says_so(operation):
    with pytest.raises(NotImplementedError, match="not loaded"):
        operation(defer(BANK))
