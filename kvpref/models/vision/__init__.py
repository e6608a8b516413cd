"""Images: towers, where their features go, and positions of tokens behind them."""
