"""Merging whole models by a recipe: `load_merge` reads one, `run_recipe` does it."""
