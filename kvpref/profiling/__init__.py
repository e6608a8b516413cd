"""Measuring a model on this machine: time per mode, beside the ideal."""
