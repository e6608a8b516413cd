"""Reference log-probs: of which model, from where, and how a checkpoint keeps them."""

from kvpref.training.references.choice import References

__all__ = ["References"]
