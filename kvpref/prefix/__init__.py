"""Prefix trees, their levels, and the cutting of long prompts into chunks, as integers. Nothing here imports torch."""
