"""Where users already are: other trainers, and code that calls a model on padded batches."""
