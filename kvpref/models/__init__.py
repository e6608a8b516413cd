"""The Hugging Face room: attaching models, their attention, masks and heads."""
