"""Compiles the C++ files of this folder into one shared library, once a machine and version.

The library lies in `$MOEKIT_CACHE` (default `~/.cache/moekit`), named after everything it was made
from, with its own SHA-256 at the end, so that a file that was cut short is never loaded. Files
whose name ends in an instruction set are compiled for it; `dispatch.cpp` says which machine runs
them.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
FLAGS = (
    *("-O3", "-std=c++17", "-fPIC", "-pthread", "-fvisibility=hidden"),
    # Nobody reads errno or the exception flags, and loops are vectorised without them.
    *("-fno-math-errno", "-fno-trapping-math"),
)
_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mpclmul")
_AVX512 = (
    *(f"-mavx512{name}" for name in ("f", "bw", "vl", "dq", "bf16")),
    "-mvpclmulqdq",
)
ISA_FLAGS = {
    "_avx2": _AVX2,
    "_avx512": (*_AVX2, *_AVX512, "-mprefer-vector-width=512"),
}
COMPILERS = ("c++", "g++", "clang++")
_DIGEST = hashlib.sha256().digest_size


class BuildError(Exception):
    """The library cannot be made; says why."""


def cached_library() -> Path:
    """The library in the cache directory, compiled if it is not there or not whole.

    Where that directory cannot be written, one among the temporary files. Raises `BuildError`.
    """
    compiler = find_compiler()
    name = f"native-{_key(compiler)}.so"
    cache = Path(os.environ.get("MOEKIT_CACHE") or Path.home() / ".cache" / "moekit")
    if _is_whole(cache / name):
        return cache / name
    try:
        cache.mkdir(parents=True, exist_ok=True)
        work = tempfile.TemporaryDirectory(prefix="build-", dir=cache)
    except OSError:
        cache = _own_temporary_folder()
        if _is_whole(cache / name):
            return cache / name
        work = tempfile.TemporaryDirectory(prefix="build-", dir=cache)
    with work as folder:
        made = compile_library(compiler, Path(folder))
        content = made.read_bytes()
        made.write_bytes(content + hashlib.sha256(content).digest())
        # Another process may do the same at this moment: both files are whole, either will do.
        os.replace(made, cache / name)
    return cache / name


def _own_temporary_folder() -> Path:
    """A folder among the temporary files that only this user can write to."""
    folder = Path(tempfile.gettempdir()) / f"moekit-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        state = folder.lstat()
        if state.st_uid == os.getuid() and not state.st_mode & 0o022:
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="moekit-"))


def find_compiler() -> str:
    """The C++ compiler: `$CXX`, or the first of c++, g++ and clang++."""
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else COMPILERS:
        found = shutil.which(name)
        if found:
            return found
    raise BuildError(f"no C++ compiler was found ({wanted or ', '.join(COMPILERS)})")


def compile_library(compiler: str, folder: Path) -> Path:
    """Compile and link all sources into `folder`."""
    sources = sorted(HERE.glob("*.cpp"))
    objects = [folder / f"{source.stem}.o" for source in sources]
    jobs = [
        [compiler, *FLAGS, *_isa_flags(source), "-c", str(source), "-o", str(made)]
        for source, made in zip(sources, objects, strict=True)
    ]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(_run, jobs))
    library = folder / "native.so"
    _run([compiler, "-shared", "-pthread", *map(str, objects), "-o", str(library)])
    return library


def _isa_flags(source: Path) -> tuple[str, ...]:
    if platform.machine() not in ("x86_64", "AMD64"):
        return ()
    return next((f for suffix, f in ISA_FLAGS.items() if source.stem.endswith(suffix)), ())


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error}") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or [
            done.stderr.strip()[-300:] or f"exit code {done.returncode}"
        ]
        raise BuildError(f"{command[0]} failed: {lines[0]}")


def _key(compiler: str) -> str:
    """What the library depends on, as a short hash."""
    resolved = Path(compiler).resolve()
    state = resolved.stat()
    made = hashlib.sha256()
    made.update(repr((platform.machine(), platform.libc_ver(), FLAGS, ISA_FLAGS)).encode())
    made.update(f"{resolved} {state.st_size} {state.st_mtime_ns}".encode())
    for source in sorted([*HERE.glob("*.cpp"), *HERE.glob("*.h")]):
        made.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return made.hexdigest()[:16]


def _is_whole(path: Path) -> bool:
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-_DIGEST]).digest() == content[-_DIGEST:]
