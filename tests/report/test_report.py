"""The page, its facts and its words, on synthetic traces whose answers are known."""

from __future__ import annotations

import io
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from moekit.analyze import Result
from moekit.core.errors import UserError
from moekit.report import Subject, gather, print_summary, render
from moekit.report.colours import DARK, LIGHT
from moekit.report.comparison import changes
from moekit.report.conclusions import conclusions
from moekit.report.dendrogram import branches, leaf_order
from moekit.report.page_json import script_json
from moekit.report.pruning import pruning_of
from moekit.report.sources import TrainingRun
from moekit.report.terminal import load_bar
from moekit.report.text_html import token_html
from moekit.report.token_text import token_strings
from moekit.report.usage import languages_of
from tests.analyze.traces import make_trace, random_ids

pytest.importorskip("plotly")
EXPERTS, WIDTH, SAMPLES, LENGTH = 8, 2, 8, 64
HOSTILE = "</script><img src=http://evil.example/x onerror=alert(1)><!--"


class Page(HTMLParser):
    """The elements of a page and the text of its scripts."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.ids: set[str] = set()
        self.scripts: list[str] = []
        self.words = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids |= {value for name, value in attrs if name == "id" and value}
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.words += f" {data}"


def trace_of(domains=("web-en", "web-fr"), dead=False, seed=0, layers=2):
    """Every domain prefers experts of its own; `dead` leaves the last expert out everywhere."""
    own = np.repeat(np.arange(SAMPLES * len(domains)) % len(domains), LENGTH)
    preference = np.zeros((len(own), layers, EXPERTS))
    for number in range(len(domains)):
        preference[own == number, :, number * 2 : number * 2 + 2] = 2.0
    if dead:
        preference[..., -1] = -99
    ids = random_ids(len(own), EXPERTS, WIDTH, layers, seed, preference)
    count = SAMPLES * len(domains)
    names = [domains[n % len(domains)] for n in range(count)]
    tokens = np.random.default_rng(seed).integers(0, 50, len(own))
    return make_trace(ids, EXPERTS, lengths=[LENGTH] * count, domains=names, tokens=tokens)


def facts_of(name="model", **options):
    return gather(Subject(name, traces=[trace_of(**options)]))


@pytest.fixture(scope="module")
def facts():
    return facts_of()


@pytest.fixture(scope="module")
def page(facts):
    return Page(render([facts]))


def test_page_loads_nothing(facts, page):
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "poster", "action", "data"):
            value = attributes.get(name) or ""
            assert not re.match(r"(?:[a-z]+:)?//", value), (tag, attributes)
    # Even what a library inside might ask for is refused by the browser.
    policy = next(a["content"] for t, a in page.tags if "http-equiv" in a)
    assert policy.startswith("default-src 'none'")
    assert "connect-src" not in policy
    style = "".join(re.findall(r"<style>(.*?)</style>", render([facts]), re.S))
    assert "url(" not in style
    assert "@import" not in style


def test_page_has_every_section_and_figure(facts, page):
    wanted = {"overview", "load", "domains", "languages", "flow", "cache", "super", "redundancy"}
    assert wanted | {"pruning", "text"} <= page.ids
    assert "training" not in page.ids
    links = {a["href"][1:] for t, a in page.tags if t == "a"}
    assert links <= page.ids
    numbers = [int(a["data-figure"]) for _, a in page.tags if "data-figure" in a]
    data = json.loads(page.scripts[0])
    assert numbers == list(range(len(data["figures"])))
    assert "that needs the model at work" in page.words


@pytest.mark.parametrize("palette", [LIGHT, DARK])
def test_figures_are_valid_in_both_schemes(page, palette):
    from plotly.graph_objects import Figure

    colours = {**palette, "link": "#11223344", "wash": "#11223344"}

    def put(value):
        if isinstance(value, str) and value.startswith("@"):
            return colours[value[1:]]
        if isinstance(value, list):
            return [put(item) for item in value]
        return {k: put(v) for k, v in value.items()} if isinstance(value, dict) else value

    figures = json.loads(page.scripts[0])["figures"]
    assert len(figures) >= 5
    for figure in figures:
        assert 0 <= figure["start"] < len(figure["views"])
        for view in figure["views"]:
            Figure(put(view["data"]), put(view["layout"]))


def test_hostile_text_stays_text():
    trace = trace_of(domains=(f"{HOSTILE}-en", "b-fr"))
    subject = Subject(HOSTILE, traces=[trace])
    subject.training = TrainingRun([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])

    class Tokenizer:
        def decode(self, ids, **_):
            return HOSTILE

    found = gather(subject, tokenizer=Tokenizer(), bits_per_byte={HOSTILE: 1.0})
    text = render([found])
    harmless = Page(render([facts_of()]))
    page = Page(text)
    assert not [a for t, a in page.tags if t == "img" or any(n.startswith("on") for n in a)]
    # Two more blocks: the text's data, and none that the text itself opened or closed.
    assert len(page.scripts) == len(harmless.scripts) + 1
    assert all(json.loads(s) for s in page.scripts if s.startswith(("{", "[")))
    assert HOSTILE in page.words
    labels = json.dumps(json.loads(page.scripts[-3])["figures"])
    assert "<img" not in labels


def test_script_json_and_tokens():
    value = {"a": ["</script>", "<!--", "\u2028", float("nan"), np.int64(3)]}
    text = script_json(value)
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"a": ["</script>", "<!--", "\u2028", None, 3]}
    assert token_html("<b>\n\t\u202e") == "&lt;b&gt;⏎\n⇥·"
    assert token_html("") == "·"


def test_tokens_that_share_a_character():
    class Bytes:
        def decode(self, ids, **_):
            return bytes(ids).decode(errors="replace")

    assert token_strings([*"a日b".encode()], Bytes()) == ["a", "", "", "日", "b"]
    # A broken character must not swallow the rest of the text.
    assert "".join(token_strings([0xE6, *b"abcd"], Bytes())).endswith("abcd")


def test_conclusions_know_the_planted_experts(facts):
    found = {c.section: c for c in conclusions(facts)}
    assert found["domains"].headline == "Experts specialise by domain"
    assert found["languages"].headline == "Languages have their own experts"
    assert found["load"].tone == "good"
    assert "16 experts" in found["load"].detail


def test_rings_are_on_the_planted_experts(facts):
    from moekit.report.maps import domain_map

    figure = domain_map(facts.usage, facts.results["specialisation"], "domains")
    for view in figure.views:
        heat, rings = view.data
        assert rings["x"]
        for expert, domain in zip(rings["x"], rings["y"], strict=True):
            row, column = heat["y"].index(domain), heat["x"].index(expert)
            assert heat["z"][row][column] > 0.5


def test_conclusions_do_not_fire_on_random_routing():
    domains = ["x-en", "y-fr"] * SAMPLES
    ids = random_ids(len(domains) * LENGTH, EXPERTS, WIDTH, 2)
    trace = make_trace(ids, EXPERTS, lengths=[LENGTH] * len(domains), domains=domains)
    found = [c.headline for c in conclusions(gather(Subject("random", traces=[trace])))]
    assert "Experts do not specialise by domain" in found
    assert "Languages have their own experts" not in found
    assert "One layer's experts say little about the next layer's" in found


def test_dead_experts_are_named():
    dead = facts_of(dead=True)
    assert dead.dead == [(0, EXPERTS - 1), (1, EXPERTS - 1)]
    load = next(c for c in conclusions(dead) if c.section == "load")
    assert load.tone == "warn"
    assert "2 of 16 experts were never chosen" in load.detail
    text = Page(render([dead]))
    assert '"symbol":"x-thin"' in text.scripts[0]


def test_two_models_side_by_side(facts):
    other = facts_of("after", dead=True, seed=1)
    page = Page(render([facts, other]))
    assert ("body", {"class": "two"}) in page.tags
    numbers = [a for _, a in page.tags if "data-figure" in a]
    alone = [a for _, a in Page(render([facts])).tags if "data-figure" in a]
    assert len(numbers) == 2 * len(alone)
    assert "What changed" in page.words
    assert "experts never chosen" in page.words
    assert changes(facts, facts)[0].headline.startswith("0 %")


def test_change_of_quality_names_the_worst_domain(facts):
    before = gather(Subject("a", traces=[trace_of()]), bits_per_byte={"x": 1.0, "y": 2.0})
    after = gather(Subject("b", traces=[trace_of()]), bits_per_byte={"x": 1.1, "y": 2.0})
    quality = changes(before, after)[0]
    # Means 1.5 and 1.55, as the table beside it says.
    assert quality.headline == "3.3 % more bits per byte of text: worse"
    assert "x (+10.0 %)" in quality.detail
    assert quality.tone == "warn"


def test_terminal_says_the_same(facts):
    out = io.StringIO()
    print_summary([facts, facts], out)
    text = " ".join(out.getvalue().split())
    for conclusion in conclusions(facts):
        assert conclusion.headline in text
    assert load_bar(np.array([0, 1, 3, 12])) == " ▁▄▇"


def test_pruning_ranks_by_what_experts_add():
    load = Result((), (), detail={"gate_mass": [np.array([1.0, 4.0, 3.0, 2.0])]})
    pruning = pruning_of(None, load, None, 16)
    assert [expert for _, expert, _ in pruning.first(2)] == [0, 3]
    cuts = {cut.share: cut.lost for cut in pruning.cuts}
    assert cuts == {0.25: pytest.approx(0.1), 0.5: pytest.approx(0.3)}
    with pytest.raises(UserError, match="neither stats"):
        pruning_of(None, None, None, 16)


def test_dendrogram_lines_do_not_cross():
    tree = np.array([[0, 2, 0.1, 2], [1, 3, 0.2, 2], [4, 5, 0.9, 4]], dtype=float)
    order = leaf_order(tree)
    assert order == [0, 2, 1, 3]
    x, y = branches(tree, order)
    assert x[:5] == [0, 0, 1, 1, None]
    assert x[10:14] == [0.5, 0.5, 2.5, 2.5]
    assert y[10:14] == [0.1, 0.9, 0.9, 0.2]


def test_languages():
    assert languages_of(["web-fr", "code-python", "en"]) == ["French", "no language", "English"]
    assert languages_of(["web-en", "wiki-en"]) is None


def test_one_sample_says_what_is_missing():
    trace = make_trace(random_ids(40, EXPERTS, WIDTH, 2), EXPERTS)
    facts = gather(Subject("one", traces=[trace]))
    page = Page(render([facts]))
    assert "All text is of one domain" in page.words
    assert "specialisation" in facts.missing


@pytest.mark.parametrize(
    ("ids", "message"),
    [(np.zeros((0, 2, 2), int), "no tokens"), (np.full((9, 2, 2), -1), "no expert was chosen")],
)
def test_nothing_recorded(ids, message):
    with pytest.raises(UserError, match=message):
        gather(Subject("empty", traces=[make_trace(ids, EXPERTS)]))


def test_without_plotly(monkeypatch, facts):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(UserError, match=r"moekit\[report\]"):
        render([facts])


def test_a_silent_layer_keeps_the_numbers_of_the_others():
    """What to prune is named by layer, also beyond a layer whose experts add nothing."""
    gates = [np.zeros(4), np.array([3.0, 1.0, 4.0, 2.0])]
    pruning = pruning_of(None, Result((), [], {}, {"gate_mass": gates}), None, 16)
    assert [place[:2] for place in pruning.first(8) if place[2]] == [(1, 1), (1, 3), (1, 0), (1, 2)]
    assert {place[0] for place in pruning.first(4)} == {0}
    with pytest.raises(UserError, match="no expert added anything"):
        pruning_of(None, Result((), [], {}, {"gate_mass": gates[:1]}), None, 16)


def test_silent_experts_and_noisy_probes_are_said(facts):
    silent = Result(
        ("layer", "expert"), [], {"super_experts": 0, "largest_over_median": float("nan")}
    )
    noisy = {"three_phases": False, "noise": 22.0, "peak": 96.0}
    entries = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]
    changed = replace(
        facts,
        results={"super-experts": silent, "training-phases": Result((), [], noisy)},
        training=TrainingRun(entries),
    )
    found = {c.section: c for c in conclusions(changed)}
    assert found["super"].headline == "Experts add nothing"
    assert "too much from probe to probe to tell" in found["training"].detail
    noisy["noise"] = 1.0
    assert "does not show" in {c.section: c for c in conclusions(changed)}["training"].detail
