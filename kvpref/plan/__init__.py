"""Tensors that describe what runs: passes, chunks, batches and steps, and their FLOPs."""
