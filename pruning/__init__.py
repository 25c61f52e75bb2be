"""Structured pruning of LLaMA-family models: structures, criteria, allocation, surgery, checkpoints."""
