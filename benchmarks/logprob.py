"""The LM head and log-softmax alone, forward and backward: fused in tiles against the full logits.

The fused one computes its logits again in the backward pass, four products in place of three, so its ideal is 0.75x;
what it saves is memory, and with it the time of reading and writing the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from options import SweepOptions

from kvpref.ops.logprob.statistics import naive_token_logprobs, token_logprobs
from kvpref.profiling.compare.comparison import Case, Comparison, compare

TITLE = "LM head and log-softmax, forward + backward"


@dataclass(frozen=True, kw_only=True)
class HeadShape:
    """Sizes of one head and its input."""

    tokens: int
    """Scored tokens."""

    hidden_size: int
    """Elements of a hidden state."""

    vocab_size: int
    """Rows of the head."""

    @property
    def name(self) -> str:
        """tokens x hidden size x vocabulary."""
        return f"{self.tokens} x {self.hidden_size} x {self.vocab_size}"


CPU_SHAPES = (
    HeadShape(tokens=1024, hidden_size=384, vocab_size=50432),
    HeadShape(tokens=1024, hidden_size=576, vocab_size=49152),
    HeadShape(tokens=4096, hidden_size=576, vocab_size=1024),
)
GPU_SHAPES = (
    HeadShape(tokens=1024, hidden_size=4096, vocab_size=128256),
    HeadShape(tokens=8192, hidden_size=4096, vocab_size=128256),
    HeadShape(tokens=65536, hidden_size=4096, vocab_size=16384),
)
NUM_PRODUCTS = {"fused": 4, "naive": 3}
FUNCTIONS = {"fused": token_logprobs, "naive": naive_token_logprobs}


def rows(options: SweepOptions) -> dict[str, Callable[[], Comparison]]:
    """Name -> what measures that row."""
    shapes = GPU_SHAPES if options.gpu_rows else CPU_SHAPES
    shapes = shapes[:1] if options.quick else shapes
    return {shape.name: partial(_measure, shape, options) for shape in shapes}


def _measure(shape: HeadShape, options: SweepOptions) -> Comparison:
    name = shape.name
    if options.dry_run:
        shape = HeadShape(tokens=16, hidden_size=32, vocab_size=shape.vocab_size // 64)
    torch.manual_seed(0)
    with torch.device(options.device):
        hidden = torch.randn(shape.tokens, shape.hidden_size, dtype=options.dtype, requires_grad=True)
        weight = torch.randn(shape.vocab_size, shape.hidden_size, dtype=options.dtype)
        weight = weight.mul_(shape.hidden_size**-0.5).requires_grad_()
        targets = torch.randint(shape.vocab_size, (shape.tokens,))

    def run(case: str) -> None:
        FUNCTIONS[case](hidden, weight, targets).sum().backward()
        hidden.grad = weight.grad = None

    cases = [
        Case(
            name=case,
            run=partial(run, case),
            flops=2 * shape.tokens * shape.hidden_size * shape.vocab_size * NUM_PRODUCTS[case],
            facts={"full_logits_bytes": 4 * shape.tokens * shape.vocab_size},
        )
        for case in FUNCTIONS
    ]
    for case in cases:
        case.run()  # warm-up
    results = compare(
        cases, baseline="naive", device=options.device, options=options.timing, with_memory=options.with_memory
    )
    return Comparison(name=name, baseline="naive", results=results)
