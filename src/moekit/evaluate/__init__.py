"""Measuring language models: bits per byte, perplexity, and the bridge to lm-eval."""
