"""Training a LongMem: the loop, checkpoints and metrics."""
