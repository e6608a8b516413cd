"""Load a folder's weights into an existing model, by their names in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from kvpref.errors import RunError


def renames_weights(model: PreTrainedModel) -> bool:
    """Whether files hold the weights under other names or split differently than the model.

    transformers converts them when it saves and loads a model, but its trainer does not when it resumes: it would
    continue with the current weights.
    """
    return bool(get_model_conversion_mapping(model, add_legacy=False))


@torch.no_grad()
def load_saved_weights(model: PreTrainedModel, folder: str | Path) -> None:
    """Load the weights that `save_pretrained` wrote.

    Raises:
        RunError: If a weight is missing.
    """
    kind: Any = type(model)
    fresh, info = kind.from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
    found: dict[str, torch.Tensor] = fresh.state_dict()
    own = model.state_dict()
    found |= _read(Path(folder), own.keys() - found.keys())  # such as a value head
    lacking = sorted({*info["missing_keys"], *(own.keys() - found.keys())})
    if lacking:
        raise RunError(f"{folder}: lacks the weight {lacking[0]!r}; resume from another checkpoint")
    model.load_state_dict({name: found[name] for name in own})


def _read(folder: Path, names: set[str]) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")) if names else ():
        with safe_open(path, framework="pt") as file:
            found.update({name: file.get_tensor(name) for name in names.intersection(file.keys())})
    return found
