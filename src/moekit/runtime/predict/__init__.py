"""Predicting which experts the next layers will use, and reading them before they are asked for."""
