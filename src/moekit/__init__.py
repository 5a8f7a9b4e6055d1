"""moekit: one toolkit for the whole life of a Mixture-of-Experts model."""

__version__ = "0.1.0"
