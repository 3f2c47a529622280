"""Measuring what a memory is worth."""

# Defaults of `longmem eval` and the quick start: tokens of each document that fill the memory, and that are used.
SCORE_FROM, DOCUMENT_TOKENS = 8_192, 12_288
