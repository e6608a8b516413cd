"""Settings of precision that contradict one another."""

from __future__ import annotations

from kvpref.cli.given_settings import Settings
from kvpref.errors import InputError

_REFUSED = {"bf16": ("float16",), "fp16": ("float16", "bfloat16")}
"""By autocast: the dtypes of weights that it does not go with. bf16 over bfloat16 casts nothing, and is often given so;
fp16 scales the loss, and gradients of float16 weights cannot be scaled back."""


def check_precision(given: Settings) -> None:
    """Refuse two autocasts, and one that does not go with the weights.

    Args:
        given: Settings by name; ``dtype``, ``bf16`` and ``fp16`` are read.

    Raises:
        InputError: If they contradict one another.
    """
    on = [name for name in _REFUSED if name in given and given[name].value is True]
    if len(on) > 1:
        first, second = (given[name].where for name in on)
        raise InputError(f"{first} and {second} contradict each other: there is one autocast; leave one of them out")
    dtype = given.get("dtype")
    for name in on:
        if dtype is not None and dtype.value in _REFUSED[name]:
            raise InputError(
                f"{given[name].where} and {dtype.where} {dtype.value} contradict each other: {name} is autocast over "
                "float32 weights; leave one of them out"
            )
