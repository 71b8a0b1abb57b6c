"""The model itself: what kind it is, what it has places for, how it is read from and written to disk."""
