"""Reference log-probs: which model gives them, where they come from, and how a checkpoint keeps them."""

from kvpref.training.references.choice import References

__all__ = ["References"]
