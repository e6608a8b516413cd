"""Equal work on all ranks."""
