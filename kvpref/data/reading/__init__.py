"""Reading files and chat messages into groups of tokens."""
