"""Tree attention over packed rows, and rows that are padded where a model cannot have it."""
