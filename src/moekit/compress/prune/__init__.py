"""Removing experts: scores, searches for sets to keep, sets per task, and skipping at run time."""
