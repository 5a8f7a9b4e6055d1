"""Performance models against hand arithmetic, simulation and the figures of their papers."""

import pytest
from transformers import Qwen3MoeConfig

from moekit.core.errors import UserError
from moekit.core.spec import MoESpec
from moekit.runtime.moe_lens import (
    BatchLoad,
    batch_bound,
    batch_forecast,
    memory_efficiency,
)
from moekit.runtime.perf_model import DecodeLoad, Machine, decode_roofline, expected_distinct

LOAD = DecodeLoad(resident_bytes=1e9, layers=10, distinct=8, expert_bytes=1e7)


def test_distinct_experts_of_uniform_routing():
    assert expected_distinct(64, 8, 8) == pytest.approx(42.0, abs=0.05)
    assert expected_distinct(256, 8, 32) == pytest.approx(163.3, abs=0.05)
    assert expected_distinct(64, 8, 1) == pytest.approx(8)


def test_in_memory_is_bytes_over_bandwidth():
    found = decode_roofline(LOAD, Machine(memory_bandwidth=3.6e9))
    assert found.step_seconds == pytest.approx(0.5)
    assert found.tokens_per_second == pytest.approx(2)
    assert found.bound == "memory"


def test_misses_are_read_while_what_is_there_is_computed():
    machine = Machine(memory_bandwidth=3.6e9, disk_bandwidth=1e9)
    cold = decode_roofline(LOAD, machine, hit_rate=0.25)
    assert cold.disk_seconds == pytest.approx(0.6)
    # 0.5 s of memory, of which the experts that are there take 0.2 / 3.6.
    assert cold.step_seconds == pytest.approx(1.1 - 0.2 / 3.6)
    assert cold.bound == "disk"
    ahead = decode_roofline(LOAD, machine, hit_rate=0.25, overlap=1.0)
    assert ahead.step_seconds == pytest.approx(0.6)
    half = decode_roofline(LOAD, machine, hit_rate=0.25, overlap=0.5)
    assert half.step_seconds == pytest.approx(0.85)


def test_a_layer_waits_once_for_the_disk_to_begin():
    machine = Machine(memory_bandwidth=1e12, disk_bandwidth=1e12, disk_latency=1e-3)
    none = decode_roofline(LOAD, machine, hit_rate=1.0)
    assert none.disk_seconds == 0
    some = decode_roofline(LOAD, machine, hit_rate=0.9)
    assert some.disk_seconds == pytest.approx(10 * (1 - 0.9**8) * 1e-3, rel=0.02)


def test_computing_and_fixed_time_bind_too():
    load = DecodeLoad(
        resident_bytes=1e6, layers=2, distinct=1, expert_bytes=1e6, active_params=1e6, batch=4
    )
    found = decode_roofline(load, Machine(memory_bandwidth=1e9, flops=1e8))
    assert (found.compute_seconds, found.bound) == (pytest.approx(0.08), "compute")
    assert found.tokens_per_second == pytest.approx(50)
    machine = Machine(memory_bandwidth=1e12, layer_seconds=0.01, step_seconds=0.03)
    found = decode_roofline(load, machine)
    assert (found.fixed_seconds, found.bound) == (pytest.approx(0.05), "overhead")


def test_context_is_read_for_every_sequence():
    settings = {"resident_bytes": 0, "layers": 1, "distinct": 0, "expert_bytes": 0}
    load = DecodeLoad(**settings, kv_bytes=1000, context=2000, batch=3)
    found = decode_roofline(load, Machine(memory_bandwidth=6e6))
    assert found.step_seconds == pytest.approx(1)
    assert found.tokens_per_second == pytest.approx(3)


def qwen3(**sizes):
    return MoESpec.from_config(Qwen3MoeConfig(**sizes, decoder_sparse_step=1, mlp_only_layers=[]))


def test_the_load_of_a_model_is_its_active_bytes():
    """The shape of Qwen3-30B-A3B: 3 billion active parameters, which at 4.5 bits and 35 GB/s are
    about 51 ms."""
    spec = qwen3(
        hidden_size=2048,
        num_hidden_layers=48,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=151936,
    )
    load = DecodeLoad.of(spec, expert_bits=4, resident_bits=4)
    expert = 3 * 2048 * 768
    assert load.expert_bytes == pytest.approx(expert * 4.5 / 8, rel=1e-6)
    assert load.distinct == pytest.approx(8)
    head = 151936 * 2048
    attention = 48 * (2 * 2048 * 4096 + 2 * 2048 * 512)
    router_and_norms = 48 * (128 * 2048 + 2 * 2048 + 2 * 128) + 2048
    expected = (head + attention) * 4.5 / 8 + router_and_norms * 2
    assert load.resident_bytes == pytest.approx(expected, rel=1e-6)
    assert load.active_params == pytest.approx(
        head + attention + router_and_norms + 48 * 8 * expert, rel=1e-6
    )
    seconds = decode_roofline(load, Machine(memory_bandwidth=35e9)).step_seconds
    assert seconds == pytest.approx(0.051, abs=0.003)


def test_tied_embeddings_are_read_once():
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 1000, "num_experts": 4}
    tied = DecodeLoad.of(qwen3(**sizes, tie_word_embeddings=True), expert_bits=16)
    apart = DecodeLoad.of(qwen3(**sizes, tie_word_embeddings=False), expert_bits=16)
    assert tied.resident_bytes == apart.resident_bytes


def test_a_measured_number_of_experts_takes_the_place_of_the_uniform_one():
    spec = qwen3(num_hidden_layers=2, num_experts=64, num_experts_per_tok=8, vocab_size=100)
    assert DecodeLoad.of(spec, expert_bits=4, batch=8).distinct == pytest.approx(42.0, abs=0.05)
    assert DecodeLoad.of(spec, expert_bits=4, batch=8, distinct=20).distinct == 20


@pytest.mark.parametrize("rates", [{"hit_rate": 1.1}, {"overlap": -0.1}])
def test_shares_are_shares(rates):
    with pytest.raises(UserError, match="from 0 to 1"):
        decode_roofline(LOAD, Machine(memory_bandwidth=1), **rates)


# -- MoE-Lens --


def batch(**changes):
    values = {"prompt": 98, "generated": 32, "kv_tokens": 1e6}
    return BatchLoad(**{**values, "weight_seconds": 4.8, "device_tokens": 1e5, **changes})


def test_memory_efficiency_of_the_paper():
    exact = sum(98 + age for age in range(33))
    assert memory_efficiency(98, 32) == pytest.approx(130 / exact)
    assert memory_efficiency(98, 32) == pytest.approx(0.03456, abs=5e-6)
    # The paper prints g where the sum has g + 1.
    assert pytest.approx(0.03564, abs=5e-6) == 2 * 130 / ((2 * 98 + 32) * 32)


def test_throughput_is_linear_in_memory_until_the_device_is_full():
    rates = [batch_bound(batch(kv_tokens=tokens)).tokens_per_second for tokens in (1e5, 2e5, 4e5)]
    assert rates[1] == pytest.approx(2 * rates[0])
    assert rates[2] == pytest.approx(4 * rates[0])
    full = batch_bound(batch(kv_tokens=1e9))
    assert (full.tokens_per_second, full.utilisation, full.bound) == (1e5, 1, "device")
    some = batch_bound(batch())
    assert some.bound == "memory"
    assert some.generated_per_second == pytest.approx(some.tokens_per_second * 32 / 130)


@pytest.mark.parametrize("kv_tokens", [2e5, 1e9])
def test_many_requests_approach_the_bound(kv_tokens):
    load = batch(kv_tokens=kv_tokens)
    bound = batch_bound(load).tokens_per_second
    few = batch_forecast(load, 100, block=1).tokens_per_second
    many = batch_forecast(load, 10**9, block=1).tokens_per_second
    assert few < many
    # Filling and draining are a thousandth of so many iterations.
    assert many == pytest.approx(bound, rel=1e-3)
    assert batch_forecast(load, 10**9, block=16).tokens_per_second <= bound


def simulate(load, requests, joining):
    """Iterations until all are done when `joining` requests enter each one and stay g more."""
    waiting, running, iterations = requests, [], 0
    while waiting or running:
        entered = min(joining, waiting)
        waiting -= entered
        running = [age - 1 for age in running if age > 1] + [load.generated + 1] * entered
        running = [age for age in running if age > 0]
        iterations += 1
        if not waiting and max(running) == 1:
            break
    return iterations


@pytest.mark.parametrize("joining", [1, 4, 10])
def test_the_forecast_counts_the_iterations_of_a_simulated_run(joining):
    held = sum(98 + age for age in range(33))
    load = batch(kv_tokens=joining * held)
    requests = 50 * joining
    rate = batch_forecast(load, requests, block=1).tokens_per_second
    iterations = requests * 130 / rate / load.weight_seconds
    assert abs(simulate(load, requests, joining) - iterations) <= 1


def test_memory_for_no_request_is_refused():
    with pytest.raises(UserError, match=r"holds no request of 98 \+ 32"):
        batch_forecast(batch(kv_tokens=100), 10)
