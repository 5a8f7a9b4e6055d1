"""`python -m moekit`."""

from moekit.cli.main import entry

entry()
