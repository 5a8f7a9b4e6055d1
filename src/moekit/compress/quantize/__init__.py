"""Quantizing experts: fewer bits a weight, with the least harm to what the model says."""
