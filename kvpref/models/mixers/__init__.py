"""Recurrent and convolution layers: which are known, and how they run in a pass."""
