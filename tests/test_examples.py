"""Each script in examples/, run on the tiny model."""

import importlib.util
from pathlib import Path

import pytest

from tests.models import write_tiny_model

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("examples") / "tiny")


def run(name, *args):
    specification = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.main(*map(str, args))


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "a.txt").write_text("der Router wählt zwei Experten für jedes Token\n")
    (tmp_path / "b.txt").write_text("0123456789 " * 5)
    return tmp_path


def test_every_example_is_tested():
    source = Path(__file__).read_text()
    assert [file.stem for file in EXAMPLES.glob("*.py") if f'"{file.stem}"' not in source] == []


def test_routing_by_text(tiny, texts):
    distances = run("routing_by_text", tiny, texts / "a.txt", texts / "b.txt")
    assert len(distances) == 2
    assert all(0 < distance <= 1 for distance in distances)
    assert run("routing_by_text", tiny, texts / "a.txt", texts / "a.txt") == [0.0, 0.0]


def test_ban_each_expert(tiny, texts):
    costs = run("ban_each_expert", tiny, texts / "a.txt")
    assert len(costs) == 4
    assert all(cost != 0 for cost in costs)


def test_compare_routers():
    results = run("compare_routers", "softmax-raw", "loss-free", 12)
    # A uniform guess among 64 tokens costs 4.16 nats.
    assert all(loss < 4.2 for loss, _ in results.values())
    assert all(1 <= imbalance <= 4 for _, imbalance in results.values())
