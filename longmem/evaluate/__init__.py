"""Measuring what a memory is worth."""
