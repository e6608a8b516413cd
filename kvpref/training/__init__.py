"""Training: a `transformers.Trainer` for preference data."""

from kvpref.training.arguments import PreferenceTrainingArguments
from kvpref.training.trainer import PreferenceTrainer

__all__ = ["PreferenceTrainer", "PreferenceTrainingArguments"]
