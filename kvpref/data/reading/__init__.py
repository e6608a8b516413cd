"""From files and chat messages to groups of tokens."""
