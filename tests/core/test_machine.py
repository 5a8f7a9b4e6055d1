"""Memory of the machine: what the system and every control group leave."""

import os

import pytest

from moekit.core.errors import UserError
from moekit.core.machine import available_memory, charged_memory

GB = 10**9
NO_LIMIT = 9223372036854771712


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(text))
    return root


def machine(root, available=10 * GB, **files):
    status = "Name:\tpython\nVmRSS:\t  300000 kB\nRssAnon:\t 1 kB\n"
    base = {
        "proc/meminfo": f"MemTotal: 1 kB\nMemAvailable:   {available // 1024} kB\n",
        "proc/self/status": status,
    }
    return write(root, {**base, **files})


def test_the_system_alone(tmp_path):
    root = machine(tmp_path)
    assert available_memory(root) == 10 * GB // 1024 * 1024
    assert charged_memory(root) == 300000 * 1024


def version_1(root, limit, usage, inactive=0, active=0, mapped=0, procs="1\n2\n"):
    group = "sys/fs/cgroup/memory/job"
    return machine(
        root,
        **{
            "proc/self/cgroup": "5:cpu:/job\n4:memory:/job\n0::/\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": 8 * GB,
            "sys/fs/cgroup/memory/memory.limit_in_bytes": NO_LIMIT,
            f"{group}/memory.usage_in_bytes": usage,
            f"{group}/memory.limit_in_bytes": limit,
            f"{group}/memory.stat": f"cache 5\nactive_file 7\ntotal_inactive_file {inactive}\n"
            f"total_active_file {active}\ntotal_mapped_file {mapped}\n",
            f"{group}/cgroup.procs": procs,
        },
    )


def test_version_1(tmp_path):
    assert available_memory(version_1(tmp_path, 4 * GB, 3 * GB)) == GB
    assert available_memory(version_1(tmp_path, 4 * GB, 3 * GB, inactive=GB)) == 2 * GB
    assert available_memory(version_1(tmp_path, 4 * GB, 3 * GB, inactive=GB, active=GB)) == 3 * GB
    assert available_memory(version_1(tmp_path, 2 * GB, 3 * GB)) == 0
    assert available_memory(version_1(tmp_path, NO_LIMIT, 3 * GB)) > 9 * GB


def test_version_2_at_every_level(tmp_path):
    base = "sys/fs/cgroup"
    root = machine(
        tmp_path,
        **{
            "proc/self/cgroup": "0::/outer/inner\n",
            f"{base}/cgroup.controllers": "memory\n",
            f"{base}/outer/memory.max": 6 * GB,
            f"{base}/outer/memory.current": 5 * GB,
            f"{base}/outer/memory.stat": "inactive_file 0\n",
            f"{base}/outer/inner/memory.max": "max",
            f"{base}/outer/inner/memory.current": 3 * GB,
            f"{base}/outer/inner/memory.stat": "inactive_file 1000\n",
            f"{base}/outer/inner/cgroup.procs": f"{os.getpid()}\n",
        },
    )
    assert available_memory(root) == GB
    assert charged_memory(root) == 3 * GB


def test_charge_of_a_group_with_others_is_not_ours(tmp_path):
    own = f"{os.getpid()}\n"
    assert charged_memory(version_1(tmp_path, NO_LIMIT, 3 * GB, procs=own)) == 3 * GB
    assert charged_memory(version_1(tmp_path, NO_LIMIT, 3 * GB, procs=own + "1\n")) < GB


def test_large_files_that_were_read_before_are_not_the_program(tmp_path):
    own = f"{os.getpid()}\n"

    def charged(**pages):
        return charged_memory(version_1(tmp_path, NO_LIMIT, 9 * GB, procs=own, **pages))

    allowed = 2**28
    assert charged(inactive=allowed // 2, active=allowed // 2) == 9 * GB
    assert charged(inactive=4 * GB, active=GB) == 4 * GB + allowed
    assert charged(inactive=4 * GB, active=GB, mapped=GB) == 5 * GB + allowed


def test_container_whose_group_is_not_mounted(tmp_path):
    root = version_1(tmp_path, GB, GB // 2)
    (root / "proc/self/cgroup").write_text("4:memory:/host/path/of/it\n")
    (root / "sys/fs/cgroup/memory/memory.limit_in_bytes").write_text(str(9 * GB))
    assert available_memory(root) == GB


def test_this_machine():
    assert 10**7 < charged_memory() < 10**12
    assert available_memory() > 10**7


def test_elsewhere(tmp_path):
    with pytest.raises(UserError, match="give bytes"):
        available_memory(tmp_path)
