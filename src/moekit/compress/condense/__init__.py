"""Merging experts: which belong together (groupings) and how a group becomes one (fusers)."""
