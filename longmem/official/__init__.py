"""The published LongMem, number for number: its checkpoints, its memory rules, its training step.

>>> model = load_official("checkpoint_best.pt", config)
>>> logits = model(tokens)  # reads the memory, then writes the segment into it
>>> model.memory.reset()

What `LongMem` does differently, and why, is in docs/published-code.md.
"""

from .loading import load_official, official_state, read_checkpoint
from .model import OfficialConfig, OfficialLongMem

__all__ = ["OfficialConfig", "OfficialLongMem", "load_official", "official_state", "read_checkpoint"]
