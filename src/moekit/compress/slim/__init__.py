"""Narrower experts: neurons by sensitivity, in stages with distillation between (SlimMoE)."""
