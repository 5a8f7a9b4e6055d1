import numpy as np
import pytest

from moekit.analyze.language_divergence import language_divergence
from moekit.core.errors import UserError

from .traces import make_trace, random_ids

LENGTH, SENTENCES, EXPERTS = 25, 30, 8


def languages(preferences, layers=6, own_sentences=0.0, seed=0):
    """A trace of parallel sentences; `preferences` [language][layer] is added to the logits."""
    rng = np.random.default_rng(seed)
    shared = own_sentences * rng.normal(size=(SENTENCES, 1, layers, EXPERTS))
    parts = [
        np.broadcast_to(np.array(p)[None, None], (SENTENCES, LENGTH, layers, EXPERTS)) + shared
        for p in preferences.values()
    ]
    bias = np.concatenate(parts).reshape(-1, layers, EXPERTS)
    ids = random_ids(len(bias), EXPERTS, 2, layers, seed, bias)
    names = [name for name in preferences for _ in range(SENTENCES)]
    return make_trace(ids, EXPERTS, lengths=[LENGTH] * len(names), domains=names)


def test_languages_that_part_at_both_ends():
    """Swahili prefers other experts in the first and last third, German nowhere."""
    away = np.zeros((6, EXPERTS))
    away[[0, 1, 4, 5], :4] = 2
    same = np.zeros((6, EXPERTS))
    result = language_divergence(languages({"en": same, "sw": away, "de": same}))
    far = np.array(result.column("sw"))
    assert (far[[0, 1, 4, 5]] > 0.05).all()
    assert (np.abs(far[[2, 3]]) < 0.01).all()
    assert (np.abs(result.column("de")) < 0.01).all()
    assert result.summary["u_shape"] > 0.02
    swahili = [row[0] for row in result.detail["p"]]
    assert [p <= 0.01 for p in swahili] == [True, True, False, False, True, True]
    assert result.detail["parallel"] == {"sw": True, "de": True}


def test_identical_languages_do_not_differ():
    flat = np.zeros((6, EXPERTS))
    p = []
    for seed in range(5):
        trace = languages({"en": flat, "xx": flat}, own_sentences=1.5, seed=seed)
        result = language_divergence(trace)
        assert abs(result.summary["u_shape"]) < 0.01
        p += [row[0] for row in result.detail["p"]]
    # 30 tests at 5 %: more than 5 has probability 0.3 %.
    assert sum(value <= 0.05 for value in p) <= 5


def test_correlation_with_loss():
    """The further a language routes from English in the middle, the higher its loss."""
    preferences = {"en": np.zeros((6, EXPERTS))}
    for number, name in enumerate(["de", "fr", "cs", "ja", "sw"]):
        preferences[name] = np.zeros((6, EXPERTS))
        preferences[name][:, :4] = 0.6 * (number + 1)
    losses = {"de": 1.0, "fr": 1.1, "cs": 1.3, "ja": 1.4, "sw": 2.0}
    trace = languages(preferences)
    found = language_divergence(trace, losses=losses).summary
    assert found["loss_correlation"] == pytest.approx(1)
    assert found["loss_p"] < 0.1
    against = language_divergence(trace, losses={"de": 1.0, "cs": 3.0, "sw": 2.0, "fr": 1.5})
    assert against.summary["loss_p"] > 0.1


def test_sentences_that_are_not_parallel():
    trace = make_trace(
        random_ids(500, 4, 1), 4, lengths=[100] * 5, domains=["en", "en", "en", "de", "de"]
    )
    assert language_divergence(trace).notes == ["de: not parallel"]


def test_a_missing_reference_is_refused():
    trace = make_trace(random_ids(100, 4, 1), 4, lengths=[50, 50], domains=["eng", "deu"])
    with pytest.raises(UserError, match="no domain is named 'en'; the trace has eng, deu"):
        language_divergence(trace)
