"""Arithmetic that knows no language model: optimizers, matrix products, masked sums, precision."""
