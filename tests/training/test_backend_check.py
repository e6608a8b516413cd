"""A backend that cannot do what the model's layers need is refused before the run."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import tiny_model

from kvpref.errors import InputError
from kvpref.ops.attention.backends.interface import Needs
from kvpref.training import PreferenceTrainingArguments
from kvpref.training.checks import check_backend, sample_needs


def test_a_softcap_is_a_need(tmp_path: Path) -> None:
    """Gemma 2 caps its scores at 50, Llama does not."""
    capped, plain = tiny_model("gemma2"), tiny_model("llama")
    head_dim = plain.config.head_dim
    assert (sample_needs(capped).softcap, sample_needs(plain)) == (True, Needs(value_head_dim=head_dim))
    args = PreferenceTrainingArguments(output_dir=str(tmp_path), use_cpu=True, backend="cpu_flash")
    check_backend(plain, args, has_reference=False)
    with pytest.raises(InputError, match="'cpu_flash' cannot run here: it has no softcap; these can: tiled, reference"):
        check_backend(capped, args, has_reference=False)
