"""Metrics as plain functions: arrays in, floats or tables out.

`evaluate/` wraps some as modules of Hugging Face's evaluate, loaded by path without a network:
`evaluate.load("metrics/evaluate/wasserstein")`.
"""
