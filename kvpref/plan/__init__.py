"""Tensors that say what runs: passes, chunks, batches, steps, and the FLOPs of it all."""
