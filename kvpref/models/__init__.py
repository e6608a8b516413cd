"""Everything that knows Hugging Face models from the inside: attaching them, their attention, masks and heads."""
