"""Reports for people: one self-contained page, and a summary in the terminal."""

from moekit.report.facts import Facts, gather
from moekit.report.page import render
from moekit.report.sources import Subject, read_subjects
from moekit.report.terminal import print_summary

__all__ = ["Facts", "Subject", "gather", "print_summary", "read_subjects", "render"]
