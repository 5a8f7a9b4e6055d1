"""Claims on merging are judged by the rule that the module states."""

from __future__ import annotations

import pytest

from benchmarks.condense_claims import difference, judge, rows_by_case


def rows(better: list[float], worse: list[float], ratio: float = 0.5) -> list[dict]:
    pairs = (("hc-smoe", better), ("m-smoe", worse))
    return [
        {"kind": "merge", "method": method, "ratio": ratio, "seed": seed, "bpb": value}
        for method, values in pairs
        for seed, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("better", "worse", "verdict"),
    [
        ([1.0, 1.1, 1.2], [1.3, 1.4, 1.5], "reproduced"),
        ([1.3, 1.4, 1.5], [1.0, 1.1, 1.2], "refuted"),
        ([1.0, 1.4, 1.2], [1.3, 1.1, 1.25], "cannot be seen at this size"),
    ],
)
def test_verdicts(better: list[float], worse: list[float], verdict: str) -> None:
    (judged,) = judge(rows_by_case(rows(better, worse)))
    assert judged["verdict"] == verdict


def test_every_ratio_must_agree() -> None:
    both = rows([1.0, 1.0], [1.3, 1.3]) + rows([1.0, 1.0], [0.9, 0.9], ratio=0.75)
    (judged,) = judge(rows_by_case(both))
    assert judged["verdict"] == "cannot be seen at this size"


def test_differences_are_of_the_same_seed_and_single_rows_stand_for_all() -> None:
    found = rows_by_case(rows([1.0, 2.0], [1.5, 2.5]))
    assert difference(found, ("merge", "hc-smoe"), ("merge", "m-smoe"), 0.5) == (0.5, 0.0)
    one = rows_by_case(rows([1.0], [1.5, 2.5]))
    assert difference(one, ("merge", "hc-smoe"), ("merge", "m-smoe"), 0.5)[0] == 1.0
    assert difference(one, ("merge", "hc-smoe"), ("merge", "dern"), 0.5) is None
