"""`shared_prefix`: a model's own forward on padded batches, with the rows' shared prefixes computed once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kvpref.engine.level_pass import run_level_pass
from kvpref.errors import InputError, UnsupportedModelError
from kvpref.integrations.shared_prefix.interception import Forward, Interception
from kvpref.integrations.shared_prefix.padded_call import CallReader, check_arguments, check_head, check_state
from kvpref.integrations.shared_prefix.padded_plans import CallPlan, LastPlan, SharingWorth
from kvpref.integrations.shared_prefix.padded_rows import SharedRows, UnservedError
from kvpref.integrations.shared_prefix.selected_attention import selected_attention
from kvpref.models.backbone import backbone
from kvpref.models.both_ways import both_ways_of
from kvpref.models.mixers.forwards import attach_mixers
from kvpref.models.own_head import GivenHidden
from kvpref.models.partitioned import has_partitioned
from kvpref.models.support import check_architecture, unwrap
from kvpref.models.text_layers import PassExtras
from kvpref.models.vision.merging import PassImages
from kvpref.models.vision.padded_call import image_arguments
from kvpref.models.vision.tower import image_features
from kvpref.ops.attention.backends import backend_names
from kvpref.state.cache import PrefixCache


@dataclass(kw_only=True)
class SharedPrefixStats:
    """Counts of what a switch has done so far."""

    num_calls: int = 0
    """Forward calls of the model's backbone."""

    num_served: int = 0
    """Calls whose shared prefixes were computed once."""

    num_tokens: int = 0
    """Tokens of the served calls, padding included."""

    num_unique_tokens: int = 0
    """Tokens that ran through the layers in their place."""

    unserved: Counter[str] = field(default_factory=Counter)
    """Calls that ran unchanged, by reason."""

    def __str__(self) -> str:
        served = f"{self.num_served} of {self.num_calls} calls served"
        tokens = f"{self.num_unique_tokens} tokens run in place of {self.num_tokens}"
        reasons = ", ".join(f"{reason} ({count})" for reason, count in self.unserved.most_common())
        return f"{served}: {tokens}; unserved: {reasons or 'none'}"


def shared_prefix(
    model: nn.Module,
    *,
    min_saved: float = SharingWorth.min_saved,
    min_saved_tokens: int = SharingWorth.min_saved_tokens,
    min_shared_tokens: int = SharingWorth.min_shared_tokens,
    backend: str = "auto",
) -> SharedPrefix:
    """Let any code that calls `model(input_ids, attention_mask, ...)` on padded batches compute shared prefixes once.

    Use it in a ``with`` statement, or keep the switch and `close` it. It finds the prefixes that the rows of a call
    share, runs each once through the model's backbone, and gives every row its hidden states; head, loss and everything
    after them are the model's own. Outputs and gradients are those of the unchanged model, to rounding, with two
    exceptions: `past_key_values` is None unless requested by ``use_cache=True`` (which runs unchanged), and hidden
    states at padding, where the unchanged model leaves meaningless numbers, are zero. A call whose head would read them
    runs unchanged; your own code that calls ``model.base_model`` must not read them.

    A call that cannot be served exactly, or shares too little to be worth it, runs the unchanged model; `stats` counts
    these by reason. The model need not be attached. Its attention, forward and config are as before once the switch is
    closed, and always for calls that are not served. Calls traced by torch.compile run unchanged and uncounted. Copies
    and pickles of the model have no switch.

    Args:
        model: Of a supported family, with a language-model head or a scalar reward head; may be inside PEFT or
            DDP, now or later. If it reads images, each may be passed with every row that holds it; equal images go
            through the vision tower once.
        min_saved: Least share of a call's tokens (padding included) that sharing must save for it to be served.
        min_saved_tokens: Least number of tokens that it must save.
        min_shared_tokens: Shorter shared prefixes are repeated in each row.
        backend: Attention backend of served calls, or ``auto``.

    Returns:
        The switch, already on.

    Raises:
        UnsupportedModelError: If no call of this model could be served exactly; the message says why.
        InputError: If a setting is out of range.
    """
    worth = SharingWorth(min_saved=min_saved, min_saved_tokens=min_saved_tokens, min_shared_tokens=min_shared_tokens)
    if backend not in ("auto", *backend_names()):
        raise InputError(f"unknown attention backend {backend!r}; choose from: auto, {', '.join(backend_names())}")
    inner = unwrap(model)
    check_architecture(inner)
    _refuse_prompts_both_ways(inner)
    _refuse_cut_weights(inner)
    return SharedPrefix(inner, LastPlan(inner, worth), backend)


def _refuse_prompts_both_ways(model: PreTrainedModel) -> None:
    if both_ways_of(model.config).spans == "prompts":
        raise UnsupportedModelError(
            f"in a {model.config.model_type!r} model all tokens of a prompt see one another, and a padded call does "
            "not say where it ends; train it with kvpref.PreferenceTrainer"
        )


def _refuse_cut_weights(model: PreTrainedModel) -> None:
    if has_partitioned(model):
        raise UnsupportedModelError(
            "DeepSpeed ZeRO-3 gathers weights in the order in which each rank's modules ran before, and "
            "served calls run them in a different one; use FSDP2, ZeRO-2, or the trainers of kvpref.integrations.trl"
        )


class SharedPrefix:
    """The switch that `shared_prefix` returns.

    Attributes:
        stats: What it has done so far.
    """

    def __init__(self, model: PreTrainedModel, plans: LastPlan, backend: str) -> None:
        self.stats = SharedPrefixStats()
        attach_mixers(model)  # permanently, because outside kvpref's passes they are unchanged
        self._model, self._plans, self._backend = model, plans, backend
        self._readers = {"model": CallReader(model), "backbone": CallReader(backbone(model))}
        self._image_names = image_arguments(model)
        self._passing = False  # whether the backbone's calls are kvpref's own
        self._caller: tuple[tuple[Any, ...], dict[str, Any]] | None = None  # the arguments of the model's own call
        self._interceptions = (
            Interception(model, self._call_model),
            Interception(backbone(model), self._call_backbone),
        )

    def close(self) -> None:
        """Switch off permanently and restore the model; closing twice does nothing."""
        for interception in self._interceptions:
            interception.close()

    def __enter__(self) -> SharedPrefix:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _call_model(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's forward: remember its arguments, some of which the backbone does not see."""
        if "kvpref_program" in kwargs:
            with self._own_calls():
                return forward(*args, **kwargs)
        before, self._caller = self._caller, (args, kwargs)
        try:
            return forward(*args, **kwargs)
        finally:
            self._caller = before

    def _call_backbone(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The backbone's forward: over unique tokens, or unchanged."""
        # While torch.compile traces the model, values are unknown; it compiles the unchanged forward.
        if self._passing or torch.compiler.is_compiling():
            return forward(*args, **kwargs)
        self.stats.num_calls += 1
        try:
            return GivenHidden(last_hidden_state=self._serve(args, kwargs))
        except UnservedError as unserved:
            self.stats.unserved[str(unserved)] += 1
        return forward(*args, **kwargs)

    def _serve(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """The backbone's last hidden states, (B, L, hidden_size).

        Raises:
            UnservedError: If the call has to run unchanged.
        """
        if has_partitioned(self._model):
            raise UnservedError("weights cut by ZeRO-3")
        arguments = self._readers["backbone"].read(args, kwargs)
        check_arguments(arguments, self._model.config, self._image_names)
        plan = self._plans.plan(arguments)
        check_state(self._model)
        if self._caller is not None:
            check_head(self._model, self._readers["model"].read(*self._caller))
        try:
            hidden = self._run(plan)
        except UnsupportedModelError:
            raise UnservedError("attention that kvpref does not follow in these rows") from None
        self.stats.num_served += 1
        self.stats.num_tokens += arguments["input_ids"].numel()
        self.stats.num_unique_tokens += plan.shared.num_unique_tokens
        return _spread(hidden, plan.shared)

    def _run(self, plan: CallPlan) -> torch.Tensor:
        """Hidden states of the unique tokens, (U, hidden_size)."""
        shared, images = plan.shared, None
        if shared.images:
            # Before selecting the attention: the tower keeps its own.
            features = image_features(self._model, shared.images, plan.image_inputs)
            images = PassImages(self._model, features, shared.sequences, plan.image_inputs, shared.images)
        with self._own_calls(), selected_attention(self._model):
            hidden = run_level_pass(
                self._model,
                shared.item,
                self._model.get_input_embeddings()(shared.item.input_ids),
                PrefixCache(),
                num_positions=shared.max_row_tokens,
                backend=self._backend,
                keep=False,
                extras=PassExtras(images=images),
            )
        return hidden[0]

    @contextmanager
    def _own_calls(self) -> Iterator[None]:
        """Let calls of the backbone inside pass through: they are kvpref's passes."""
        before, self._passing = self._passing, True
        try:
            yield
        finally:
            self._passing = before


def _spread(hidden: torch.Tensor, shared: SharedRows) -> torch.Tensor:
    """Give every cell of the padded batch its hidden state: (U, hidden_size) -> (B, L, hidden_size), padding zero."""
    # A token's gradients are summed over all rows that share it; 16 bits would round at each addition.
    wide = hidden.float() if hidden.dtype in (torch.float16, torch.bfloat16) else hidden
    rows = torch.cat((wide, wide.new_zeros(1, wide.shape[1])))
    return rows.index_select(0, shared.unique_rows).view(*shared.shape, -1).to(hidden.dtype)
