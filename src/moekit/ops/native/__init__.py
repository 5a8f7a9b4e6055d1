"""C++ kernels for CPUs: products with encoded matrices, whole experts, checksums."""

from __future__ import annotations

from moekit.ops.native.library import ISAS, Library, Pool, library, loaded
from moekit.ops.native.structures import ACTIVATIONS, ExpertFormat, FfnJob, Format, MatmulJob

__all__ = [
    "ACTIVATIONS",
    "ISAS",
    "ExpertFormat",
    "FfnJob",
    "Format",
    "Library",
    "MatmulJob",
    "Pool",
    "library",
    "loaded",
]
