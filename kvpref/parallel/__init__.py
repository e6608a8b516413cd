"""Running passes on several ranks: wrappers, sharded weights, agreement and failures."""
