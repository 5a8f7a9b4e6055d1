"""Colours of the page and its figures, light and dark.

Figures name colours by role, as "@ink" or "@series1"; the page puts in those of the reader's scheme
and changes them when the scheme changes. The categorical colours keep their order, which keeps
neighbours apart for readers with a colour vision deficiency.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Scale = list[list[float | str]]


def _scale(*colours: str) -> Scale:
    last = len(colours) - 1
    return [[number / last, colour] for number, colour in enumerate(colours)]


LIGHT: dict[str, str | Scale] = {
    "page": "#f6f6f3",
    "surface": "#ffffff",
    "ink": "#17171a",
    "soft": "#55555c",
    "line": "#dededb",
    "accent": "#1f63b5",
    "good": "#0b7a3e",
    "warn": "#b04a00",
    "info": "#1f63b5",
    "series1": "#2a78d6",
    "series2": "#d9541a",
    "series3": "#11875a",
    "series4": "#8a5cd1",
    "series5": "#b8860b",
    "reference": "#85858a",
    "more": _scale("#f3f6fb", "#b9d3f2", "#6aa3e3", "#2a6cc0", "#123a73"),
    "around": _scale("#cf7a2c", "#ecc397", "#f2f2ef", "#5b9be0", "#0d3c7a"),
}
DARK: dict[str, str | Scale] = {
    "page": "#131316",
    "surface": "#1d1d21",
    "ink": "#f0f0ee",
    "soft": "#b0b0b6",
    "line": "#3a3a40",
    "accent": "#7fb4f5",
    "good": "#5fcf94",
    "warn": "#f2a25c",
    "info": "#7fb4f5",
    "series1": "#5a9fee",
    "series2": "#f0804a",
    "series3": "#3fbf8a",
    "series4": "#b08cf0",
    "series5": "#dcae3c",
    "reference": "#8e8e95",
    "more": _scale("#232830", "#1f4270", "#2a6cc0", "#6aa3e3", "#cfe2fb"),
    "around": _scale("#b0662a", "#63401f", "#2b2b30", "#2f6db5", "#a5cdfa"),
}


def css_variables(palette: Mapping[str, Any]) -> str:
    """The palette as CSS custom properties, its scales as gradients."""
    values = {
        name: value
        if isinstance(value, str)
        else f"linear-gradient(90deg,{','.join(str(colour) for _, colour in value)})"
        for name, value in palette.items()
    }
    return "".join(f"--{name}:{value};" for name, value in values.items())
