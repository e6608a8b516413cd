"""Images: towers, where their features go, and the positions of tokens after them."""
