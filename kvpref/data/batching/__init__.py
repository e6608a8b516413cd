"""Which groups go into which micro-batch."""
