"""`python -m moekit`, which torchrun needs."""

from moekit.cli.main import entry

entry()
