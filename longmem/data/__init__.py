"""Texts for training and evaluation: fetching them, reading them, and walking them segment by segment."""
