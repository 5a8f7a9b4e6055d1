import numpy as np
import pytest

from moekit.analyze.information import (
    entropy,
    jensen_shannon,
    mutual_information,
    npmi,
    p_value,
    spearman,
)


def test_known_values():
    assert entropy(np.array([[1, 1, 1, 1], [5, 0, 0, 0], [0, 0, 0, 0]])).tolist() == [2, 0, 0]
    assert mutual_information(np.array([[3, 0], [0, 3]])) == pytest.approx(1)
    assert mutual_information(np.outer([1, 2], [3, 4, 5])) == pytest.approx(0, abs=1e-12)
    assert jensen_shannon(np.array([1.0, 0.0]), np.array([0.0, 2.0])) == pytest.approx(1)
    assert jensen_shannon(np.array([1.0, 3.0]), np.array([2.0, 6.0])) == pytest.approx(0)


def test_npmi_at_its_ends():
    value = npmi(np.array([[4, 0, 0], [0, 4, 0]]))
    assert value == pytest.approx(np.array([[1, -1, 0], [-1, 1, 0]]))
    assert npmi(np.outer([1, 2], [3, 4])) == pytest.approx(np.zeros((2, 2)), abs=1e-12)


def test_p_value_counts_itself():
    assert p_value(5.0, np.arange(9.0)) == 0.5
    assert p_value(9.0, np.arange(9.0)) == 0.1


def test_rank_correlation_with_ties():
    assert spearman(np.array([1, 2, 3]), np.array([10, 20, 90])) == pytest.approx(1)
    assert spearman(np.array([1, 1, 2, 2]), np.array([2, 2, 1, 1])) == pytest.approx(-1)
    assert np.isnan(spearman(np.array([1, 1]), np.array([1, 2])))
