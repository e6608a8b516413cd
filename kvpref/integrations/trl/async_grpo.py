"""TRL's AsyncGRPOTrainer, with log-probs and entropies of its tree rows from kvpref's engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel
from trl.experimental.async_grpo import async_grpo_trainer

from kvpref.integrations.trl.forwards import replaced_heads
from kvpref.integrations.trl.trainers import SharedPromptTrainer
from kvpref.integrations.trl.tree_forward import add_tree_row_head

_LOAD = "create_model_from_path"


class AsyncGRPOTrainer(SharedPromptTrainer, async_grpo_trainer.AsyncGRPOTrainer):
    """`trl.experimental.async_grpo.AsyncGRPOTrainer`, with its tree rows run by kvpref.

    Rollouts, packing, loss and metrics are TRL's. TRL's attention, which is FlashAttention 3 from the hub, reads a copy
    of the keys and values of each segment's whole path; kvpref's backends read each shared prefix where it is. Models
    with recurrent or convolution layers, which TRL refuses because of its kernel, train too.

    Args and errors as in `kvpref.integrations.trl.DPOTrainer`.
    """

    _trl_class = async_grpo_trainer.AsyncGRPOTrainer
    _add_head = staticmethod(add_tree_row_head)

    @contextmanager
    def _construction(self) -> Iterator[None]:
        with _layer_types_hidden() as hidden:

            def add(model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
                hidden.show()  # needed for attaching
                self._add_head(model, *args, **kwargs)

            with replaced_heads(async_grpo_trainer, self.kvpref_mode, add):
                yield


class _HiddenLayerTypes:
    """A loaded model's layer types, by which TRL refuses models that its kernel cannot run."""

    def __init__(self) -> None:
        self._configs: list[tuple[Any, Any]] = []

    def hide(self, model: PreTrainedModel) -> None:
        text = model.config.get_text_config()
        if getattr(text, "layer_types", None) is not None:
            self._configs.append((text, text.layer_types))
            text.layer_types = None

    def show(self) -> None:
        for text, layer_types in self._configs:
            text.layer_types = layer_types
        self._configs.clear()


@contextmanager
def _layer_types_hidden() -> Iterator[_HiddenLayerTypes]:
    """Hide layer types from when TRL loads a model until they are shown again; TRL reads them only for its check."""
    original, hidden = getattr(async_grpo_trainer, _LOAD), _HiddenLayerTypes()

    def load(*args: Any, **kwargs: Any) -> PreTrainedModel:
        model: PreTrainedModel = original(*args, **kwargs)
        hidden.hide(model)
        return model

    setattr(async_grpo_trainer, _LOAD, load)
    try:
        yield hidden
    finally:
        setattr(async_grpo_trainer, _LOAD, original)
        hidden.show()
