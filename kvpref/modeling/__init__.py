"""The only room that touches Hugging Face internals."""
