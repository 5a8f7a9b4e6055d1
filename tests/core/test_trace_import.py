"""Recorded routing of other servers: what is read, what is converted, what is refused."""

import base64
import io
import json

import numpy as np
import pytest

from moekit.core.errors import UserError
from moekit.core.spec import MoESpec
from moekit.core.trace import DECODE, PREFILL, RoutingTrace
from moekit.core.trace_import import import_traces
from tests.families.tiny import TINY
from tests.models import tiny_config


@pytest.fixture(scope="module")
def spec():
    return MoESpec.from_config(tiny_config())


def routing(tokens, seed=0, layers=2):
    rng = np.random.default_rng(seed)
    return np.argsort(rng.random((tokens, layers, 4)), axis=-1)[..., :2].astype(np.int32)


def write(path, *records):
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return base64.b64encode(file.getvalue()).decode()


def flat(array):
    return base64.b64encode(array.astype("<i4").tobytes()).decode()


def ids_of(trace):
    return np.stack([trace.layer(p).topk_ids.numpy() for p in range(len(trace.layers))], axis=1)


def test_an_array(tmp_path, spec):
    ids = routing(9).astype(np.int16)
    ids[0] = -1
    np.save(tmp_path / "code.run1.npy", ids)
    trace = import_traces([tmp_path / "code.run1.npy"], spec)
    assert (ids_of(trace) == ids).all()
    assert trace.header.model_type == "qwen3_moe"
    assert [(m.index, m.num_experts, m.top_k) for m in trace.layers] == [(0, 4, 2), (1, 4, 2)]
    assert trace.domains == ["code"]
    assert (trace.tokens == -1).all()
    weights = trace.layer(0).topk_weights
    assert (weights[0] == 0).all()
    assert weights[1:].isnan().all()


def test_vllm_responses(tmp_path, spec):
    """Lists and base64 arrays, the prompt's routing apart, two completions of one prompt."""
    prompt, first, second = routing(3), routing(4, 1), routing(2, 2)
    lists = {
        "prompt_routed_experts": prompt.tolist(),
        "prompt_token_ids": [5, 6, 7],
        "choices": [
            {"routed_experts": first.tolist(), "token_ids": [1, 2, 3, 4]},
            {"routed_experts": npy(second), "token_ids": [8, 9]},
        ],
    }
    whole = {"choices": [{"routed_experts": npy(routing(6, 3))}], "domain": "maths"}
    trace = import_traces([write(tmp_path / "chat.jsonl", lists, whole)], spec)
    assert [(s.start, s.stop, s.domain) for s in trace.samples] == [
        (0, 7, "chat"),
        (7, 12, "chat"),
        (12, 18, "maths"),
    ]
    assert (ids_of(trace)[:12] == np.concatenate([prompt, first, prompt, second])).all()
    assert trace.tokens.tolist()[:12] == [5, 6, 7, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert trace.phase.tolist()[:12] == [PREFILL] * 3 + [DECODE] * 4 + [PREFILL] * 3 + [DECODE] * 2


def test_sglang_responses(tmp_path, spec):
    """Flat int32 numbers for all tokens but the last, in either place."""
    ids = routing(5)
    own = {
        "input_ids": [1, 2, 3],
        "output_ids": [4, 5, 6],
        "meta_info": {"routed_experts": flat(ids)},
    }
    open_ai = {"choices": [{"sgl_ext": {"routed_experts": flat(ids)}}]}
    trace = import_traces([write(tmp_path / "a.jsonl", own, open_ai)], spec)
    assert (ids_of(trace) == np.concatenate([ids, ids])).all()
    assert trace.tokens.tolist() == [1, 2, 3, 4, 5, -1, -1, -1, -1, -1]
    assert trace.phase.tolist()[:5] == [PREFILL] * 3 + [DECODE] * 2


def test_sglang_recorder(tmp_path, spec):
    """Physical experts of a prefill of two sequences and of a decode, in a map with a copy."""
    mapping = [[3, 2, 1, 0, 3], [0, 1, 2, 3, 0]]
    physical = routing(5).transpose(1, 0, 2).copy()
    physical[0, 0] = [4, 1]
    records = [
        {
            "input_ids": [10, 11, 12, 13, 14],
            "extend_seq_lens": [3, 2],
            "topk_ids_of_layer": np.pad(
                physical, ((0, 0), (0, 0), (0, 6)), constant_values=-1
            ).tolist(),
        },
        {
            "input_ids": [20, 21],
            "extend_seq_lens": None,
            "topk_ids_of_layer": physical[:, :2].tolist(),
        },
    ]
    dump = {"records": records, "last_physical_to_logical_map": mapping}
    trace = import_traces([write(tmp_path / "dump.json", dump)], spec)
    assert trace.header.lengths == [3, 2, 1, 1]
    assert trace.tokens.tolist() == [10, 11, 12, 13, 14, 20, 21]
    assert trace.phase.tolist() == [PREFILL] * 5 + [DECODE] * 2
    found = ids_of(trace)
    assert found[0, 0].tolist() == [3, 2]
    assert (found[:5, 1] == physical[1]).all()
    assert (found[:5, 0] == np.array(mapping[0])[physical[0]]).all()


def test_layers_without_experts_are_left_out(tmp_path):
    """The tiny model's first layer is dense; SGLang records zeros there, or anything."""
    config = TINY["qwen3_moe"]()
    spec = MoESpec.from_config(config)
    assert (spec.num_layers, spec.moe_layers) == (3, (1, 2))
    ids = routing(4, layers=3)
    ids[:, 0] = 0
    response = {"meta_info": {"routed_experts": flat(ids)}}
    trace = import_traces([write(tmp_path / "x.json", response)], spec)
    assert (ids_of(trace) == ids[:, 1:]).all()
    assert [layer.index for layer in trace.layers] == [1, 2]


def test_it_can_be_saved_and_read_again(tmp_path, spec):
    np.save(tmp_path / "x.npy", routing(9))
    import_traces([tmp_path / "x.npy"], spec).save(tmp_path / "trace")
    assert (ids_of(RoutingTrace.open(tmp_path / "trace")) == routing(9)).all()


def test_zeros_that_a_server_did_not_record_are_refused(tmp_path, spec):
    ids = routing(5)
    ids[3, 1] = 0
    np.save(tmp_path / "x.npy", ids)
    with pytest.raises(UserError, match=r"token 3 has \[0, 0\] in layer 1; no router chooses"):
        import_traces([tmp_path / "x.npy"], spec)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (routing(5) + 2, "expert 5 in layer 0, whose experts are 0 to 3"),
        (routing(5) - 3, "expert -3 in layer 0"),
        (routing(5, layers=3), r"ids are \[5, 3, 2\]; the model needs \[tokens, 2 MoE layers, 2\]"),
        (routing(5)[:, :, :1], r"ids are \[5, 2, 1\]"),
        (np.zeros((5, 2)), "whole numbers, not float64"),
        (np.concatenate([routing(5), 5 - routing(5)[..., :1]], -1), "3 choices a token"),
        (np.zeros(7, dtype=int), "7 ids are not tokens x 2 layers x 2"),
    ],
)
def test_arrays_of_other_models_are_refused(tmp_path, spec, ids, message):
    np.save(tmp_path / "x.npy", ids)
    with pytest.raises(UserError, match=message):
        import_traces([tmp_path / "x.npy"], spec)


def test_pickles_are_never_read(tmp_path, spec):
    np.save(tmp_path / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="no array of numbers"):
        import_traces([tmp_path / "x.npy"], spec)
    (tmp_path / "x.pt").write_bytes(b"")
    with pytest.raises(UserError, match="is a pickle, which can run code"):
        import_traces([tmp_path / "x.pt"], spec)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "no"}, "no routed_experts in it"),
        ({"logical_count": [[1]]}, "mode per_token instead of stat"),
        ({"routed_experts": "%%"}, "no base64"),
        ({"routed_experts": "QUJD"}, "3 bytes of routed_experts are no int32"),
        ({"routed_experts": [[[0, 1], [2]]]}, "rows of different lengths"),
        ({"choices": ["x"]}, "a choice is no object"),
        ({"routed_experts": routing(2).tolist(), "input_ids": "x"}, "no list of whole numbers"),
        (
            {"routed_experts": routing(2).tolist(), "input_ids": [1], "output_ids": [2, 3, 4]},
            "routing of 2 tokens and 4 token ids",
        ),
        ({"records": [{"input_ids": [1]}]}, "no topk_ids_of_layer"),
        (
            {"topk_ids_of_layer": routing(3).transpose(1, 0, 2).tolist(), "extend_seq_lens": [2]},
            "3 tokens, but sequences of 2",
        ),
        (
            {
                "topk_ids_of_layer": routing(3).transpose(1, 0, 2).tolist(),
                "last_physical_to_logical_map": [[0], [0]],
            },
            r"map is \[2, 1\], the ids are \[2, 3, 2\] up to 3",
        ),
        (7, "neither an array"),
        ([], "whole numbers"),
    ],
)
def test_damaged_records_are_refused(tmp_path, spec, record, message):
    with pytest.raises(UserError, match=message):
        import_traces([write(tmp_path / "x.json", record)], spec)


def test_files_of_other_kinds_are_refused(tmp_path, spec):
    (tmp_path / "x.csv").write_text("1")
    with pytest.raises(UserError, match=r"read from \.npy, \.json, \.jsonl files"):
        import_traces([tmp_path / "x.csv"], spec)
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match="is no JSON"):
        import_traces([tmp_path / "x.json"], spec)
    (tmp_path / "x.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="no routing in the files"):
        import_traces([tmp_path / "x.jsonl"], spec)
    with pytest.raises(UserError, match="cannot be read"):
        import_traces([tmp_path / "absent.json"], spec)
