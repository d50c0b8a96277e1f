"""Training: one loop for every method, and the scripts that feed it."""
