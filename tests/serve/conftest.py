from tests.cli.conftest import moekit, refused

__all__ = ["moekit", "refused"]
