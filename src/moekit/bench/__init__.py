"""Measuring how fast a model runs on this machine, beside other programs and forecasts."""
