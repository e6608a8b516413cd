"""From groups to what one rank runs in one planned step."""
