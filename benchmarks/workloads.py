"""Where the token lists come from: synthetic grids, length statistics of known data sets, and real files.

A workload is one step: its groups, how they are cut into micro-batches, and the model that they are for.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from llama_models import DRY_RUN, LAYERS_OF_8B, SMOLLM_LIKE, LlamaSizes
from options import SweepOptions

from kvpref import Group, Sequence
from kvpref.profiling.compare.modes import Cut

MODES = ("two_pass", "one_pass", "packed")
GPU_MODES = ("two_pass", "packed")
"""Eight minutes are not enough for three."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Workload:
    """One step's work."""

    sizes: LlamaSizes
    """The model that runs it."""

    cuts: Mapping[str, Cut]
    """Mode -> the groups of each micro-batch."""

    bar: float | None = None
    """Efficiency that modes which share are held to; None where there is no such bar."""


Builders = dict[str, Callable[[], Workload]]
"""Name -> what makes the workload; data is read when it is called."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Groups of equal sequences."""

    prompt: int
    """Tokens of the prompt."""

    response: int
    """Tokens of each response."""

    responses: int
    """Responses per prompt."""

    groups: int = 1
    """Prompts."""

    packed_cut: int = 1
    """Micro-batches that `packed` cuts a group into, where all its repeated prompts at once would not fit in memory."""

    @property
    def name(self) -> str:
        """prompt/response/responses."""
        return f"{self.prompt}/{self.response}/{self.responses}"


GRID = (
    Shape(prompt=512, response=128, responses=2),
    Shape(prompt=1024, response=128, responses=2),
    Shape(prompt=1024, response=128, responses=8),
    Shape(prompt=2048, response=64, responses=4),
)
VOCABULARIES = {"49k": 49152, "1k": 1024}

GPU_GRID = (
    (Shape(prompt=4096, response=512, responses=2), 4, 0.95),
    (Shape(prompt=16384, response=64, responses=2), 4, 0.95),
    (Shape(prompt=8192, response=2048, responses=32, packed_cut=4), 2, 0.90),
)
"""Shape, layers and bar."""

GPU_ATTENTION_GRID = tuple(
    Shape(prompt=prompt, response=response, responses=28)
    for response in (2048, 1024)
    for prompt in (4096, 16384, 32768)
)
"""DualKV publishes 1.62x, 3.74x and 6.00x at 28 responses and prompts of 4K, 16K and 32K, without their length. With 2K
(the length of its training run) the ideals are 2.21x, 4.22x and 6.88x, so that is likely; 1K stands beside it."""

LENGTH_STATISTICS = {
    "Capybara": (1160, 1.59),
    "HH-RLHF": (186, 2.15),
    "MetaMath-DPO": (872, 3.91),
    "TLDR": (416, 11.14),
    "Helpsteer": (775, 6.34),
    "UltraFeedback": (409, 0.42),
}
"""Median tokens and prompt tokens per completion token (arXiv 2410.20305, table 1)."""


def grid(options: SweepOptions, vocabularies: Mapping[str, int] = VOCABULARIES) -> Builders:
    """Prompt, response and number of responses, under a large and a small vocabulary."""
    shapes = GRID[:2] if options.quick else GRID
    chosen = {"1k": vocabularies["1k"]} if options.quick else vocabularies
    return {
        f"{shape.name} vocab {name}": _builder(shape, SMOLLM_LIKE.with_vocabulary(size), options, bar=0.95)
        for name, size in chosen.items()
        for shape in shapes
    }


def gpu_grid(options: SweepOptions) -> Builders:
    """Layers of an 8B model, pairs and 32 responses."""
    return {
        shape.name: _builder(shape, replace(LAYERS_OF_8B, num_layers=layers), options, bar=bar)
        for shape, layers, bar in GPU_GRID
    }


def gpu_attention_grid(options: SweepOptions) -> Builders:
    """28 responses to long prompts."""
    return {shape.name: _builder(shape, LAYERS_OF_8B, options, bar=0.85) for shape in GPU_ATTENTION_GRID}


def length_statistics(options: SweepOptions, budget_tokens: int = 4096) -> Builders:
    """Pairs as long as the median of six data sets.

    The published median is taken as that of a prompt with one completion, so with the ratio r of prompt to completion a
    completion has median / (1 + r) tokens and the prompt the rest. Every pair of a workload has these lengths; there
    are as many (at least two) as make `budget_tokens` when packed.
    """
    names = ("TLDR", "UltraFeedback") if options.quick else tuple(LENGTH_STATISTICS)
    builders = {}
    for name in names:
        total, ratio = LENGTH_STATISTICS[name]
        response = round(total / (1 + ratio))
        pairs = max(2, budget_tokens // (2 * total))
        shape = Shape(prompt=total - response, response=response, responses=2, groups=pairs)
        builders[f"{name} {shape.prompt}/{shape.response}"] = _builder(
            shape, SMOLLM_LIKE.with_vocabulary(VOCABULARIES["1k"]), options
        )
    return builders


def make_groups(shape: Shape, vocab_size: int, seed: int = 0) -> list[Group]:
    """Random tokens; the responses to a prompt differ from their first token on, and the first one is the best."""
    generator = random.Random(f"{shape.name} {seed}")
    groups = []
    for _ in range(shape.groups):
        prompt = generator.choices(range(vocab_size), k=shape.prompt)
        firsts = generator.sample(range(vocab_size), k=shape.responses)
        responses = [[first, *generator.choices(range(vocab_size), k=shape.response - 1)] for first in firsts]
        groups.append(
            Group(
                [Sequence.from_prompt_and_response(prompt, response) for response in responses],
                scores=[1.0, *[0.0] * (shape.responses - 1)],
            )
        )
    return groups


def one_micro_batch(groups: list[Group], packed_cut: int = 1, modes: tuple[str, ...] = MODES) -> dict[str, Cut]:
    """All groups together; `packed` with each group's sequences in `packed_cut` micro-batches of equal size."""
    if packed_cut == 1:
        return {mode: [groups] for mode in modes}
    parts = []
    for group in groups:
        size = -(-len(group) // packed_cut)
        parts += [[Group(group.sequences[start : start + size])] for start in range(0, len(group), size)]
    return {mode: parts if mode == "packed" else [groups] for mode in modes}


def _builder(
    shape: Shape, sizes: LlamaSizes, options: SweepOptions, bar: float | None = None
) -> Callable[[], Workload]:
    if options.dry_run:
        # Prompts stay longer than the shortest run of tokens that is worth sharing.
        shape = replace(shape, prompt=max(24, shape.prompt // 256), response=max(2, shape.response // 256), groups=1)
        sizes, bar = DRY_RUN, None

    def build() -> Workload:
        groups = make_groups(shape, sizes.vocab_size)
        modes = GPU_MODES if options.gpu_rows else MODES
        return Workload(sizes=sizes, cuts=one_micro_batch(groups, shape.packed_cut, modes), bar=bar)

    return build
