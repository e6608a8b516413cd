"""The GPU run: stages, each in its own process, with results kept row by row."""
