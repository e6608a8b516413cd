"""Integers: prefix trees, their levels, and how long prompts are cut into chunks. Nothing here imports torch."""
