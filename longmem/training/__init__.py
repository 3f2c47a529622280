"""Training a LongMem: cached backbone states, the loop, checkpoints and metrics."""
