"""Compiling the kernels: once, by anyone at the same time, and saying why when it cannot be."""

import ctypes
import subprocess
import sys
import zlib

import pytest
import torch

from moekit.core.errors import UserError
from moekit.ops import native
from moekit.ops.native import build
from moekit.ops.native.library import library

SMALL = 'extern "C" __attribute__((visibility("default"))) int answer(void) { return 42; }\n'


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A folder with one small source instead of the kernels, and a cache directory."""
    try:
        build.find_compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "small.cpp").write_text(SMALL)
    monkeypatch.setattr(build, "HERE", folder)
    monkeypatch.setenv("MOEKIT_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def fresh():
    """The library is looked for again, before and after the test."""
    library.cache_clear()
    yield
    library.cache_clear()


def answer(path):
    return ctypes.CDLL(str(path)).answer()


def test_made_once(sources, monkeypatch):
    path = build.cached_library()
    assert answer(path) == 42
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    monkeypatch.setattr(build, "compile_library", None)
    assert build.cached_library() == path


def test_made_again_when_a_source_changes(sources):
    path = build.cached_library()
    (sources / "small.cpp").write_text(SMALL.replace("42", "43"))
    assert build.cached_library() != path
    assert answer(build.cached_library()) == 43


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped"])
def test_a_damaged_file_is_replaced(sources, damage):
    path = build.cached_library()
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    path.write_bytes({"cut": content[:-100], "empty": b"", "flipped": content}[damage])
    assert answer(build.cached_library()) == 42


def test_a_cache_that_cannot_be_written(sources, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOEKIT_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(build.tempfile, "tempdir", str(tmp_path))
    path = build.cached_library()
    assert path.parent.parent == tmp_path
    assert answer(path) == 42
    # Others may write there: a folder that they prepared is not used.
    assert build.cached_library() == path
    path.parent.chmod(0o777)
    other = build.cached_library()
    assert other.parent != path.parent
    assert answer(other) == 42


def test_two_processes_at_the_same_moment(sources, tmp_path):
    code = (
        "import ctypes, pathlib, sys; from moekit.ops.native import build;"
        "build.HERE = pathlib.Path(sys.argv[1]);"
        "print(ctypes.CDLL(str(build.cached_library())).answer())"
    )
    command = [sys.executable, "-c", code, str(sources)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0] for process in running] == ["42\n", "42\n"]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_an_error_names_its_reason(sources):
    (sources / "small.cpp").write_text("int broken(")
    with pytest.raises(build.BuildError, match=r"failed: .*error"):
        build.cached_library()


@pytest.mark.parametrize(
    ("compiler", "message"),
    [("no-such-compiler", "no C.. compiler was found .no-such"), ("false", "false failed: exit")],
)
def test_without_a_compiler_there_is_one_warning(fresh, sources, monkeypatch, compiler, message):
    monkeypatch.setenv("CXX", compiler)
    assert native.loaded() is None
    with pytest.warns(RuntimeWarning, match=message) as seen:
        found = [native.library(), native.library()]
    assert found == [None, None]
    assert len(seen) == 1
    assert native.loaded() is None


def test_loaded_does_not_compile(fresh):
    assert native.loaded() is None
    if native.library() is not None:
        assert native.loaded() is native.library()


def test_checksums_are_those_of_zlib(kernels):
    data = torch.randint(0, 256, (3000,), dtype=torch.uint8)
    for size in (*range(0, 200), 1023, 2048):
        for start in (0, 1, 13):
            piece = data[start : start + size]
            for before in (0, 0xDEADBEEF):
                assert kernels.crc32(piece, before) == zlib.crc32(piece.numpy(), before)
    view = memoryview(bytearray(b"in two "))
    assert kernels.crc32(b"parts", kernels.crc32(view)) == zlib.crc32(b"in two parts")


def test_an_unknown_instruction_set_is_refused(fresh, monkeypatch):
    found = library()
    if found is None:
        pytest.skip("no compiler")
    library.cache_clear()
    monkeypatch.setenv("MOEKIT_ISA", "avx3")
    with pytest.raises(UserError, match=rf"MOEKIT_ISA is 'avx3'; this machine runs .*{found.isa}"):
        library()
    monkeypatch.setenv("MOEKIT_ISA", found.isa)
    assert library().isa == found.isa
