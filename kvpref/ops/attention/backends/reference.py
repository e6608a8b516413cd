"""`reference`: dense masked softmax, the oracle of every test. Any device, any float dtype."""

from __future__ import annotations

from collections.abc import Iterator

from kvpref.ops.attention.backends.plain_torch import PlainTorch, Tile
from kvpref.ops.attention.block import VarlenBlock


class Reference(PlainTorch):
    """Materialises (G, H/G, Tq, Tk) scores per pair, both halves of a square."""

    name = "reference"

    def tiles(self, block: VarlenBlock, num_heads: int) -> Iterator[Tile]:
        return (Tile(*pair, 0, 0) for pair in block.pairs)
