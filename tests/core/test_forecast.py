"""Hardware and forecasts."""

import os

from moekit.core.forecast import Forecast, Hardware


def test_hardware_is_this_machine() -> None:
    found = Hardware.read()
    assert 1 <= found.cores <= (os.cpu_count() or 1)
    assert found.memory == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert found.cpu
    assert found.to_dict()["gpus"] == list(found.gpus)


def test_a_part_is_scaled_to_the_whole() -> None:
    plan = Forecast.from_part(2.0, 300, 0.25, {"tokens": 4000}, "the first batch")
    assert (plan.bytes, plan.seconds) == (1200, 8.0)
    assert plan.rows() == [("tokens", "4,000"), ("bytes", "1,200"), ("seconds", "8.0")]
    assert plan.to_dict() == {
        "dry_run": True,
        "tokens": 4000,
        "bytes": 1200,
        "seconds": 8.0,
        "basis": "measured on the first batch",
    }
