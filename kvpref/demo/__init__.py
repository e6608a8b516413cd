"""The demonstration: a task whose answers a program can check, a tiny model trained on it, and the modes compared."""
