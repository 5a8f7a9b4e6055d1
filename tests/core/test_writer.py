"""The writer's frame: sharding, resuming, and what is left behind when something goes wrong."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file

from moekit.core import writer as writer_module
from moekit.core.checkpoint import Checkpoint, TensorInfo
from moekit.core.errors import UserError
from moekit.core.writer import CheckpointWriter, WriteInterrupted


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "bank": torch.randn(6, 4, 8, generator=generator).bfloat16(),
        "odd": torch.arange(3, dtype=torch.uint8),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "flag": torch.tensor([True, False]),
        "fp8": torch.randn(4, 4, generator=generator).to(torch.float8_e4m3fn),
        "weight": torch.randn(16, 8, generator=generator),
    }


def infos(values):
    return {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in values.items()}


def fill(writer, values, rows=2, stop_after=None):
    """Write in pieces of `rows` rows; stop after that many pieces."""
    pieces = 0
    for name, first in writer.pending():
        tensor = values[name]
        for start in range(first, max(1, len(tensor)) if tensor.ndim else 1, rows):
            if pieces == stop_after:
                return False
            writer.write_rows(name, start, tensor[start : start + rows] if tensor.ndim else tensor)
            pieces += 1
    return True


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.float(), b.float())


def check(out, values):
    with Checkpoint(out) as checkpoint:
        assert sorted(checkpoint.names()) == sorted(values)
        assert all(same(checkpoint.get(name), values[name]) for name in values)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 500, 1])
def test_round_trip_and_stock_reader(tmp_path, max_shard_bytes):
    values = tensors()
    out = tmp_path / "deep" / "out"
    with CheckpointWriter(out, infos(values), max_shard_bytes=max_shard_bytes) as writer:
        fill(writer, values)
        writer.write_file("config.json", "{}")
        writer.commit()
    check(out, values)
    loaded = {}
    for file in sorted(out.glob("*.safetensors")):
        loaded |= load_file(file)
    assert all(same(loaded[name], values[name]) for name in values)
    assert writer.written_bytes == writer.total_bytes == sum(t.nbytes for t in values.values())
    assert os.listdir(out.parent) == ["out"]
    sharded = {f"model-{i:05d}-of-{n:05d}.safetensors" for n in [len(writer.shard_files)]
               for i in range(1, n + 1)}  # fmt: skip
    single = {"model.safetensors"}
    expected = single if max_shard_bytes == 10**9 else sharded | {"model.safetensors.index.json"}
    assert set(os.listdir(out)) == expected | {"config.json"}


def test_shards_stay_below_the_target_unless_one_tensor_is_larger(tmp_path):
    values = {f"t{i}": torch.full((10,), float(i)) for i in range(7)} | {"big": torch.ones(100)}
    with CheckpointWriter(tmp_path / "out", infos(values), max_shard_bytes=100) as writer:
        fill(writer, values)
        writer.commit()
    sizes = {}
    for file in writer.shard_files:
        names = Checkpoint(tmp_path / "out" / file).names()
        sizes[file] = sum(values[name].nbytes for name in names)
        assert sizes[file] <= 100 or names == ["big"]
    assert len(sizes) == 5


def test_tensors_are_aligned_to_their_item_size(tmp_path):
    values = tensors()
    with CheckpointWriter(tmp_path / "out", infos(values)) as writer:
        fill(writer, values)
        writer.commit()
    checkpoint = Checkpoint(tmp_path / "out")
    for name, tensor in values.items():
        assert checkpoint._entry(name).start % tensor.dtype.itemsize == 0


@pytest.mark.parametrize("stop_after", range(1, 14))
@pytest.mark.parametrize("max_shard_bytes", [10**9, 100])
def test_resume_from_every_point(tmp_path, monkeypatch, stop_after, max_shard_bytes):
    monkeypatch.setattr(writer_module, "JOURNAL_BYTES", 1)
    values = tensors()
    out = tmp_path / "out"

    def make():
        return CheckpointWriter(
            out, infos(values), identity={"a": 1}, max_shard_bytes=max_shard_bytes
        )

    with make() as first:
        assert not fill(first, values, stop_after=stop_after)
    assert not out.exists()
    with make() as second:
        assert second.resumed_bytes == first.written_bytes > 0
        assert "Resuming" in second.resume_note()
        assert "--restart" in second.resume_note()
        wrote = []
        original = second.write_rows
        monkeypatch.setattr(second, "write_rows", lambda *a: (wrote.append(a), original(*a)))
        assert fill(second, values)
        assert sum(rows.nbytes for _, _, rows in wrote) == second.total_bytes - first.written_bytes
        second.commit()
    check(out, values)
    assert os.listdir(tmp_path) == ["out"]


def test_resume_when_all_is_written_but_not_committed(tmp_path):
    values = tensors()
    with CheckpointWriter(tmp_path / "out", infos(values)) as writer:
        assert fill(writer, values)
    with CheckpointWriter(tmp_path / "out", infos(values)) as writer:
        assert list(writer.pending()) == []
        writer.commit()
    check(tmp_path / "out", values)


def interrupted(tmp_path, values, **identity):
    with CheckpointWriter(tmp_path / "out", infos(values), identity=identity) as writer:
        fill(writer, values, stop_after=2)
    return writer.partial


def test_resume_with_other_parameters_is_refused(tmp_path):
    values = tensors()
    partial = interrupted(tmp_path, values, dtype="float32", source="a")
    before = {path: path.read_bytes() for path in partial.iterdir()}
    with (
        pytest.raises(UserError, match="begun with dtype = 'float32', now it is 'bfloat16'"),
        CheckpointWriter(
            tmp_path / "out", infos(values), identity={"dtype": "bfloat16", "source": "a"}
        ),
    ):
        pass
    with (
        pytest.raises(UserError, match="max_shard_bytes"),
        CheckpointWriter(
            tmp_path / "out", infos(values), max_shard_bytes=9,
            identity={"dtype": "float32", "source": "a"},
        ),
    ):  # fmt: skip
        pass
    assert {path: path.read_bytes() for path in partial.iterdir()} == before


def test_resume_with_other_tensors_is_refused(tmp_path):
    values = tensors()
    interrupted(tmp_path, values)
    values["more"] = torch.ones(2)
    with pytest.raises(UserError, match="begun for other tensors"):
        CheckpointWriter(tmp_path / "out", infos(values)).__enter__()


def test_restart_discards(tmp_path):
    values = tensors()
    partial = interrupted(tmp_path, values, dtype="float32")
    (partial / "left").mkdir()
    other = {name: t.clone().fill_(1) for name, t in values.items() if name != "fp8"}
    with CheckpointWriter(tmp_path / "out", infos(other), restart=True) as writer:
        assert writer.resumed_bytes == 0
        fill(writer, other)
        writer.commit()
    check(tmp_path / "out", other)
    assert not (tmp_path / "out" / "left").exists()


def test_a_damaged_partial_directory_is_refused(tmp_path):
    values = tensors()
    partial = interrupted(tmp_path, values)
    shard = partial / "model.safetensors.part"
    with shard.open("r+b") as file:
        file.truncate(100)
    with pytest.raises(UserError, match="has 100 bytes, its journal expects"):
        CheckpointWriter(tmp_path / "out", infos(values)).__enter__()
    journal = json.loads((partial / "journal.json").read_text())
    (partial / "journal.json").write_text(json.dumps(journal | {"version": 99}))
    with pytest.raises(UserError, match="version 99"):
        CheckpointWriter(tmp_path / "out", infos(values)).__enter__()
    (partial / "journal.json").unlink()
    with pytest.raises(UserError, match="no journal"):
        CheckpointWriter(tmp_path / "out", infos(values)).__enter__()


def test_existing_output(tmp_path):
    values = tensors()
    out = tmp_path / "out"
    out.mkdir()
    with CheckpointWriter(out, infos(values)) as writer:  # an empty directory is no output
        fill(writer, values)
        writer.write_file("config.json", "{}")
        writer.commit()
    with pytest.raises(UserError, match="--overwrite"):
        CheckpointWriter(out, infos(values)).__enter__()
    new = {"only": torch.ones(3)}
    with CheckpointWriter(out, infos(new), overwrite=True) as writer:
        fill(writer, new)
        check(out, values)  # the old one stays until the new one is complete
        writer.commit()
    check(out, new)
    assert os.listdir(out) == ["model.safetensors"]
    assert os.listdir(tmp_path) == ["out"]


def test_overwrite_never_replaces_something_else(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no checkpoint"):
        CheckpointWriter(tmp_path / "home", {}, overwrite=True).__enter__()
    with pytest.raises(UserError, match="is a file"):
        CheckpointWriter(tmp_path / "home" / "thesis.txt", {}, overwrite=True).__enter__()
    assert not (tmp_path / "home.partial").exists()


def test_a_link_to_a_directory_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    values = tensors()
    with CheckpointWriter(tmp_path / "link", infos(values)) as writer:
        fill(writer, values)
        writer.commit()
    check(tmp_path / "disk", values)
    assert (tmp_path / "link").is_symlink()


def test_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        CheckpointWriter(tmp_path / "file" / "out", infos(tensors())).__enter__()
    with pytest.raises(UserError, match="cannot be written"):
        CheckpointWriter("/proc/out", infos(tensors())).__enter__()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_without_permission(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(UserError, match="Permission denied"):
        CheckpointWriter(tmp_path / "out", infos(tensors())).__enter__()


def test_too_little_disk_space_is_found_before_writing(tmp_path):
    huge = {"bank": TensorInfo((10**6, 10**9), torch.float32)}
    with pytest.raises(UserError, match=r"needs 4000 TB more and its disk has .* free"):
        CheckpointWriter(tmp_path / "out", huge).__enter__()
    assert os.listdir(tmp_path) == []


def test_disk_that_fills_up(tmp_path, monkeypatch):
    values = {f"t{i}": torch.randn(4, 8) for i in range(4)}
    monkeypatch.setattr(writer_module, "JOURNAL_BYTES", 1)
    real, calls = os.pwrite, []

    def pwrite(handle, data, offset):
        calls.append(offset)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with (
        pytest.raises(UserError, match=r"is full after 256 B of 512 B .*same command to resume"),
        CheckpointWriter(tmp_path / "out", infos(values)) as writer,
    ):
        fill(writer, values, rows=4)
    assert os.listdir(tmp_path) == ["out.partial"]
    monkeypatch.undo()
    with CheckpointWriter(tmp_path / "out", infos(values)) as writer:
        assert writer.resumed_bytes == 256
        fill(writer, values)
        writer.commit()
    check(tmp_path / "out", values)


def test_file_size_limit_of_the_system(tmp_path):
    """The same path with a real error of the kernel instead of a made-up one."""
    code = """
        import torch, sys
        from moekit.core.checkpoint import TensorInfo
        from moekit.core.writer import CheckpointWriter
        info = TensorInfo((100, 1000), torch.float32)
        with CheckpointWriter(sys.argv[1], {"a": info}) as writer:
            writer.write("a", torch.ones(100, 1000))
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), tmp_path / "out"],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)),
    )
    assert "UserError: The disk of" in result.stderr
    assert "is full after 0 B of 400 kB" in result.stderr
    assert not (tmp_path / "out").exists()


def test_two_writers_at_the_same_place(tmp_path):
    values = tensors()
    with (
        CheckpointWriter(tmp_path / "out", infos(values)),
        pytest.raises(UserError, match="Another process is writing"),
    ):
        CheckpointWriter(tmp_path / "out", infos(values)).__enter__()


def test_failure_before_the_first_byte_leaves_nothing(tmp_path):
    with (
        pytest.raises(RuntimeError),
        CheckpointWriter(tmp_path / "out", infos(tensors())),
    ):
        raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_misuse_is_found(tmp_path):
    values = tensors()
    with CheckpointWriter(tmp_path / "out", infos(values)) as writer:
        with pytest.raises(ValueError, match="does not fit"):
            writer.write("bank", values["bank"].float())
        with pytest.raises(ValueError, match="does not fit"):
            writer.write("bank", values["bank"][:, :2])
        with pytest.raises(ValueError, match="out of order"):
            writer.write("odd", values["odd"])
        with pytest.raises(ValueError, match="out of order"):
            writer.write_rows("bank", 1, values["bank"][:1])
        with pytest.raises(ValueError, match="too much"):
            writer.write("bank", torch.cat([values["bank"]] * 2))
        with pytest.raises(ValueError, match="is not written"):
            writer.commit()
        pending = writer.pending()
        next(pending)
        with pytest.raises(ValueError, match="not written completely"):
            next(pending)


def interrupt(out, values):
    with CheckpointWriter(out, infos(values)) as writer:
        fill(writer, values, stop_after=2)
        raise KeyboardInterrupt


def test_keyboard_interrupt_says_how_to_go_on(tmp_path):
    with pytest.raises(WriteInterrupted, match=r"The same command resumes it; discard it"):
        interrupt(tmp_path / "out", tensors())
    assert isinstance(WriteInterrupted(), KeyboardInterrupt)
    assert os.listdir(tmp_path) == ["out.partial"]


SLOW = """
    import sys, time, torch
    from moekit.core import writer
    from moekit.core.checkpoint import TensorInfo
    writer.JOURNAL_BYTES = 4096
    rows, names = 64, [f"t{i}" for i in range(4)]
    infos = {name: TensorInfo((rows, 1024), torch.float32) for name in names}
    with writer.CheckpointWriter(sys.argv[1], infos, max_shard_bytes=600_000) as out:
        print("resumed", out.resumed_bytes, flush=True)
        for name, first in out.pending():
            for row in range(first, rows):
                out.write_rows(name, row, torch.full((1, 1024), float(row)))
                print(row, flush=True)
                time.sleep(float(sys.argv[2]))
        out.commit()
"""


def slow(out, pause):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SLOW), str(out), str(pause)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL])
def test_process_ended_in_the_middle(tmp_path, kill):
    out = tmp_path / "out"
    total = 4 * 64 * 4096
    for rows in (100, 50):
        process = slow(out, 0.002)
        for line in process.stdout:
            rows -= line.strip().isdigit()
            if rows == 0:
                break
        process.send_signal(kill)
        _, errors = process.communicate(timeout=60)
        assert process.returncode != 0
        assert not out.exists()
        if kill == signal.SIGINT:
            assert "WriteInterrupted" in errors
    process = slow(out, 0)
    text, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    resumed = int(text.split()[1])
    assert 149 * 4096 <= resumed < total
    assert text.count("\n") == 1 + (total - resumed) // 4096
    expected = torch.arange(64.0)[:, None].expand(64, 1024)
    check(out, {f"t{i}": expected for i in range(4)})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("max_shard_bytes", [10**9, 100])
def test_partial_directory_is_no_model(tmp_path, max_shard_bytes):
    values = tensors()
    with CheckpointWriter(
        tmp_path / "out", infos(values), max_shard_bytes=max_shard_bytes
    ) as writer:
        assert fill(writer, values)
    assert not list(writer.partial.glob("*.safetensors"))
    with pytest.raises(UserError, match="has no model"):
        Checkpoint(writer.partial)


def test_resume_after_a_crash_in_the_middle_of_the_commit(tmp_path, monkeypatch):
    values = tensors()
    replaced = []
    real = os.replace

    def replace(source, target):
        if str(source).endswith(".part"):
            replaced.append(target)
        if len(replaced) == 2:
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    writer = CheckpointWriter(tmp_path / "out", infos(values), max_shard_bytes=100)
    with writer:
        fill(writer, values)
        with pytest.raises(UserError, match="Input/output error"):
            writer.commit()
    monkeypatch.undo()
    assert len(list(writer.partial.glob("*.safetensors"))) == 1
    with CheckpointWriter(tmp_path / "out", infos(values), max_shard_bytes=100) as writer:
        assert list(writer.pending()) == []
        writer.commit()
    check(tmp_path / "out", values)
