"""The prefix tree of one group, showing what is shared, as text and as a picture."""
