"""Evaluation of trained models: perplexity, LAMBADA, lm-evaluation-harness, in any layout."""
