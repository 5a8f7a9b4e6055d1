"""Growing MoE models: dense to MoE, several models to one MoE, larger MoE, and the way back."""
