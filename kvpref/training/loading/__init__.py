"""Turning groups into what one rank runs in one batched step."""
