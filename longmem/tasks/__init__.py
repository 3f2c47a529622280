"""Tasks whose answers are known, for showing that a memory works."""
