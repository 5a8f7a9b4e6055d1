"""What can run a model here: moekit at its codecs, transformers, llama.cpp."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from moekit.bench.workers import Worker
from moekit.core.errors import UserError
from moekit.core.load import PACKED_FILE
from moekit.core.packed_header import PackedHeader
from moekit.export.gguf import convert_gguf
from moekit.runtime.pack_cache import cache_directory, packed_copy

TRANSFORMERS = "transformers bf16 grouped_mm"
STORED = "moekit bf16"
F16 = "llama.cpp f16"
# The GGUF type beside a codec of moekit's.
BESIDE = {"int4": "q4_0", "int8": "q8_0"}
FOLDER = "bench"


@dataclass
class Programs:
    """The programs for one model, by name, and why others are left out.

    `packed` is the model in `codec`, which `name` runs; `model` the unpacked one, if there is one.
    """

    model: Path | None
    packed: Path
    codec: str
    threads: int
    peer: str | None = None
    starts: dict[str, Callable[[], Worker]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"moekit {self.codec}"

    @property
    def quantised_peer(self) -> str:
        return f"llama.cpp {BESIDE.get(self.codec, '')}"

    def moekit(self, *options: str, path: Path | None = None) -> Worker:
        """moekit on the packed model, with options of `worker_moekit`."""
        directory = str(path or self.packed)
        return Worker("worker_moekit.py", directory, "--threads", str(self.threads), *options)

    def transformers(self, dtype: str) -> Worker:
        """transformers on the unpacked model."""
        options = ("--dtype", dtype, "--threads", str(self.threads))
        return Worker("worker_transformers.py", str(self.model), *options)

    def llama(self, file: Path) -> Worker:
        """llama.cpp on a GGUF file."""
        assert self.peer is not None
        options = ("--mmap", "--threads", str(self.threads))
        return Worker("worker_llama.py", str(file), *options, python=self.peer)


def find_programs(
    model: Path,
    codec: str,
    *,
    threads: int,
    peer_python: str | None,
    note: Callable[[str], None],
) -> Programs:
    """The programs for the model in directory `model`; what they need is made and kept in moekit's
    cache directory. A packed model is run by moekit alone.

    `peer_python` is a Python that has llama-cpp-python; by default this one, if it does. Raises
    UserError for one that has not.
    """
    if (model / PACKED_FILE).is_file():
        name = PackedHeader.read(model).layers[0].codecs[0].name
        found = Programs(None, model, name, threads)
        found.starts[found.name] = found.moekit
        found.left_out.append("the model is packed: only moekit runs it")
        return found
    peer = _peer(peer_python)
    packed = packed_copy(model, codec, 32, note=note)
    found = Programs(model, packed, codec, threads, peer)
    found.starts[found.name] = found.moekit
    stored = packed_copy(model, "bf16", 32, note=note)
    found.starts[STORED] = lambda: found.moekit("--dtype", "bfloat16", path=stored)
    found.starts[TRANSFORMERS] = lambda: found.transformers("bfloat16")
    if found.peer is None:
        found.left_out.append("llama.cpp: no llama-cpp-python here; --peer-python names another")
        return found
    for kind in (BESIDE.get(codec), "f16"):
        if kind is None:
            continue
        try:
            file = _gguf(model, packed.name.rpartition("-")[2], kind, note)
        except UserError as error:
            found.left_out.append(f"llama.cpp {kind}: {error}")
            continue
        found.starts[f"llama.cpp {kind}"] = lambda file=file: found.llama(file)  # type: ignore[misc]
    return found


def _gguf(model: Path, state: str, kind: str, note: Callable[[str], None]) -> Path:
    """The model as GGUF, made once for a `state` of its files."""
    file = cache_directory() / FOLDER / f"{model.resolve().name}-{state}-{kind}.gguf"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        note(f"writing {file}")
        convert_gguf(model, file, gguf_type=kind)
    return file


def _peer(asked: str | None) -> str | None:
    if asked is None:
        return sys.executable if importlib.util.find_spec("llama_cpp") is not None else None
    try:
        subprocess.run([asked, "-c", "import llama_cpp"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"--peer-python {asked} has no llama-cpp-python: {error}") from None
    return asked
