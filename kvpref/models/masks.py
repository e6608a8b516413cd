"""Read the rule of a kind of layers from the model's own mask function.

transformers hands the registered mask function each layer type's `mask_function(batch, head, query, key) -> bool`.
It is evaluated here on positions inside a sequence, never on row indices, and only on a few rows of O(T) each. Shape
legend: T positions.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from transformers.masking_utils import causal_mask_function

from kvpref.errors import UnsupportedModelError
from kvpref.prefix.rules import CAUSAL, Rule

MaskFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

MAX_DENSE_POSITIONS = 2048
"""Longest sequence under a mask of unknown form, which is evaluated and planned pair by pair."""

_NUM_RANDOM_ROWS = 4
_PADDED = "use mode 'padded' for this model"


def read_rule(mask_function: MaskFunction, num_positions: int) -> Rule:
    """The rule of a mask function over sequences of up to `num_positions` tokens.

    A mask that is causal for all of these lengths counts as causal, such as a window at least as long.

    Raises:
        UnsupportedModelError: If tokens see later ones or none at all, if the mask has no form known here and
            sequences are longer than `MAX_DENSE_POSITIONS`, or if it depends on more than positions.
    """
    if mask_function is cast(MaskFunction, causal_mask_function):
        return CAUSAL
    inner = _unpacked(mask_function)
    # At most one number: the padding of a pass's only row. More could describe single tokens, such as an image's, which
    # a few probed rows may miss.
    if any(tensor.numel() > 1 for tensor in _tensors_in(inner)):
        raise UnsupportedModelError(
            f"a layer's attention mask depends on more than positions inside the sequence; {_PADDED}"
        )
    try:
        with unset_fake_temporarily(), torch.inference_mode(False), _OnTheHost():
            return _known_rule(inner, num_positions) or _dense_rule(inner, num_positions)
    except UnsupportedModelError:
        raise
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UnsupportedModelError(
            f"a layer's mask function cannot be evaluated on positions ({reason}); {_PADDED}"
        ) from error


def is_causal(mask_function: MaskFunction) -> bool:
    """Whether a mask function is transformers' own for layers that see all earlier tokens."""
    return _unpacked(mask_function) is cast(MaskFunction, causal_mask_function)


def _known_rule(mask_function: MaskFunction, num_positions: int) -> Rule | None:
    """The causal, window or chunk rule that all probed rows follow; None if there is none."""
    sees_first = _visible(mask_function, torch.arange(num_positions), torch.tensor(0), num_positions)
    size = int(sees_first.sum())  # under all three rules exactly the first queries see the first key
    rules = [CAUSAL] if size == num_positions else [Rule("window", size), Rule("chunk", size)] if size else []
    visible = {
        row: _visible(mask_function, torch.tensor(row), torch.arange(num_positions), num_positions)
        for row in _probed_rows(num_positions, size)
    }
    for rule in rules:
        if all(torch.equal(mask, _row_under(rule, row, num_positions)) for row, mask in visible.items()):
            return rule
    return None


def _probed_rows(num_positions: int, size: int) -> list[int]:
    # Where windows and chunks differ, and where chunks begin.
    rows = {0, num_positions // 2, num_positions - 1, size - 1, size, size + 1, 2 * size - 1, 2 * size}
    # A separate seeded generator: probing must not change the user's random state.
    rows.update(random.Random(num_positions).randrange(num_positions) for _ in range(_NUM_RANDOM_ROWS))
    return sorted(row for row in rows if 0 <= row < num_positions)


def _row_under(rule: Rule, row: int, num_positions: int) -> torch.Tensor:
    keys = torch.arange(num_positions)
    return (keys <= row) & (keys >= rule.first_key(row))


def _dense_rule(mask_function: MaskFunction, num_positions: int) -> Rule:
    """The dense rule, from evaluating every row."""
    if num_positions > MAX_DENSE_POSITIONS:
        raise UnsupportedModelError(
            f"a layer's attention mask is neither causal nor a window nor chunked, and this batch holds a sequence "
            f"of {num_positions} tokens; such masks go up to {MAX_DENSE_POSITIONS} (max_prompt_tokens, "
            f"max_response_tokens), or {_PADDED}"
        )
    positions = torch.arange(num_positions)
    mask = mask_function(torch.tensor(0), torch.tensor(0), positions[:, None], positions[None, :])
    visible = mask.expand(num_positions, num_positions).numpy()
    if np.triu(visible, 1).any():
        raise UnsupportedModelError(f"a layer's attention lets tokens see later ones; {_PADDED}")
    if not visible.any(axis=1).all():
        raise UnsupportedModelError(f"a layer's attention lets some tokens see nothing; {_PADDED}")
    return Rule("dense", ranges=tuple(map(_ranges, visible)))


def _ranges(visible: np.ndarray) -> tuple[tuple[int, int], ...]:
    """The runs of true values in a row, as (first, stop)."""
    edges = np.flatnonzero(np.diff(visible, prepend=False, append=False))
    return tuple((first, stop) for first, stop in edges.reshape(-1, 2).tolist())


def _visible(
    mask_function: MaskFunction, queries: torch.Tensor, keys: torch.Tensor, num_positions: int
) -> torch.Tensor:
    """Which pairs of one query and all keys, or of all queries and one key, meet: (T,) bool."""
    zero = torch.zeros((), dtype=torch.int64)
    return mask_function(zero, zero, queries, keys).expand(num_positions)


def _unpacked(mask_function: Any) -> MaskFunction:
    """The mask inside the wrapper that transformers adds when it takes a row for several packed sequences.

    The wrapper works on rows; the passes' own blocks keep sequences apart.
    """
    parts = _captured(mask_function).get("mask_functions", ())
    names = [getattr(part, "__qualname__", "").split(".")[0] for part in parts]
    if names == ["packed_sequence_mask_function", "remap_positions_for_packed_sequence"]:
        return cast(MaskFunction, _captured(parts[1])["mask_function"])
    return cast(MaskFunction, mask_function)


def _captured(function: Any) -> dict[str, Any]:
    """The variables in a function's closure."""
    code: Any = getattr(function, "__code__", None)
    cells = getattr(function, "__closure__", None)
    return {name: cell.cell_contents for name, cell in zip(code.co_freevars, cells, strict=True)} if cells else {}


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in a function's closure."""
    if isinstance(value, torch.Tensor):
        yield value
        return
    inside: Iterable[Any] = value if isinstance(value, list | tuple) else _captured(value).values()
    if isinstance(value, partial):
        inside = (value.func, *value.args, *value.keywords.values())
    for item in inside:
        yield from _tensors_in(item)


class _OnTheHost(TorchFunctionMode):
    """Makes tensors in a mask function's closure readable in host memory.

    Fake tensors have no values; in masks they count padding, of which a pass has none.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*map(_on_the_host, args), **(kwargs or {}))


def _on_the_host(value: Any) -> Any:
    if isinstance(value, FakeTensor):
        return torch.zeros(value.shape, dtype=value.dtype)
    return value.cpu() if isinstance(value, torch.Tensor) and value.device.type != "cpu" else value
