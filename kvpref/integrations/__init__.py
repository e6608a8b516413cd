"""Integrations with other trainers, and with code that calls a model on padded batches."""
