"""Responses drawn from a language model, row by row from seeds of their own."""
