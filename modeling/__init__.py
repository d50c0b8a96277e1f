"""The models, one self-contained folder per method."""
