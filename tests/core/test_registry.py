import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import moekit
from moekit.core.errors import UserError
from moekit.core.registry import INDEX_PATH, KINDS, Registry, registry


@pytest.fixture
def small():
    """Two methods of one kernel and two namesakes, in a registry of their own."""
    small = Registry()

    @small.register(
        "saliency",
        "frequency",
        title="How often an expert is chosen",
        needs=("trace",),
        options={"power": "exponent of the count"},
    )
    def score(counts, *, power: float = 1.0, floor: int):
        return power, floor

    small.register_preset(
        score,
        "frequency-squared",
        kind="saliency",
        title="The same, squared",
        paper="Example, arXiv:0000.00000",
        needs=("trace",),
        settings={"power": 2.0},
    )
    small.register("policy", "lru", title="Least recently used", lossless=True)(lambda: None)
    small.register("predictor", "lru", title="The same again")(lambda: None)
    return small


def names(methods):
    return [method.name for method in methods]


def test_filters(small):
    assert names(small.methods()) == ["frequency", "frequency-squared", "lru", "lru"]
    assert names(small.methods(kind="saliency")) == ["frequency", "frequency-squared"]
    assert names(small.methods(needs="trace")) == ["frequency", "frequency-squared"]
    assert names(small.methods(needs="none")) == ["lru", "lru"]
    assert names(small.methods(pattern="freq*d")) == ["frequency-squared"]


def test_options_come_from_the_signature(small):
    (power,) = small.find("frequency").options
    assert (power.name, power.default, power.required) == ("power", 1.0, False)
    assert power.help == "exponent of the count"


def test_preset_binds_its_settings():
    small = Registry()
    preset = small.register_preset(
        json.dumps, "indented", kind="measure", title="json.dumps", settings={"indent": 1}
    )
    assert preset.load()([1]) == "[\n 1\n]"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda r: r.find("frequenzy"), "did you mean frequency"),
        (lambda r: r.find("zzz"), "moekit list"),
        (lambda r: r.find("lru"), "policy, predictor"),
        (lambda r: r.find("frequency", kind="policy"), "no policy method"),
        (lambda r: r.methods(kind="polcy"), "did you mean policy"),
        (lambda r: r.methods(needs="zzz"), "weights, data"),
    ],
)
def test_wrong_names_get_a_hint(small, call, words):
    with pytest.raises(UserError, match=words):
        call(small)


def test_one_of_two_namesakes_by_kind(small):
    assert small.find("lru", kind="policy").lossless is True


def test_wrong_registrations_fail(small):
    with pytest.raises(ValueError, match="not one of"):
        small.register("spaghetti", "x", title="x")(lambda: None)
    with pytest.raises(ValueError, match="needs"):
        small.register("policy", "x", title="x", needs=("luck",))(lambda: None)
    with pytest.raises(ValueError, match="keyword-only"):
        small.register("policy", "x", title="x", options={"a": "?"})(lambda a: None)
    with pytest.raises(ValueError, match="registered by"):
        small.register("policy", "lru", title="x")(json.dumps)


def test_index_is_fresh():
    """Fails when a registration changed: run `python -m moekit.core.registry`."""
    assert INDEX_PATH.read_text(encoding="utf-8") == registry.index_text()


@pytest.mark.parametrize("method", registry.methods(), ids=lambda m: f"{m.kind}-{m.name}")
def test_every_method_can_be_loaded(method):
    assert callable(method.load())
    assert method.kind in KINDS
    assert method.title
    assert "\n" not in method.title


def run_list(tmp_path, plugin):
    """`moekit list --json` with one more distribution installed, whose module is `plugin`."""
    (tmp_path / "fake_plugin.py").write_text(textwrap.dedent(plugin))
    dist = tmp_path / "fake_plugin-1.0.dist-info"
    dist.mkdir()
    (dist / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-plugin\nVersion: 1.0\n")
    (dist / "entry_points.txt").write_text("[moekit.methods]\nfake = fake_plugin\n")
    source = Path(moekit.__file__).parents[1]
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(source)!r}]\n"
    code += "from moekit.cli.main import entry; entry()"
    return subprocess.run(
        [sys.executable, "-c", code, "list", "--json"], capture_output=True, text=True
    )


def test_third_party_methods_join_by_entry_point(tmp_path):
    done = run_list(
        tmp_path,
        """
        from moekit.core.registry import register

        @register("policy", "fake-random", title="Evict at random")
        def evict(slots): ...
        """,
    )
    assert done.returncode == 0, done.stderr
    listed = {method["name"]: method for method in json.loads(done.stdout)["methods"]}
    assert listed["fake-random"]["target"] == "fake_plugin:evict"
    assert "bits-per-byte" in listed


def test_a_broken_third_party_package_hides_nobody(tmp_path):
    done = run_list(tmp_path, "import a_module_that_is_not_there")
    assert done.returncode == 0, done.stderr
    assert "a_module_that_is_not_there" in done.stderr
    assert "bits-per-byte" in done.stdout
