"""Triton kernels for experts and matrices in the formats of packed records.

`available` says whether they can run; the modules beside need the `triton` package.
"""

from __future__ import annotations

import importlib.util


def available() -> bool:
    """Whether the `triton` package is installed."""
    return importlib.util.find_spec("triton") is not None
