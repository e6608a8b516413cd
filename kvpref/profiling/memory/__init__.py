"""Memory of a step: measured, drawn, reported."""
