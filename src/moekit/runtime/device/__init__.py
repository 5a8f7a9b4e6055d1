"""Experts in the memory of a GPU, above those in RAM and on disk."""
