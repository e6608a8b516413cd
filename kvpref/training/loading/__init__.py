"""From groups to what one rank runs in one batched step."""
