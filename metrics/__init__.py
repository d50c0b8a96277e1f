"""Metrics as plain functions: arrays in, floats or tables out."""
