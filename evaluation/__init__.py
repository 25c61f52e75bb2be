"""Scoring of language models: commonsense suites through lm-eval, and perplexity."""
