"""Training arguments: those of transformers, and what kvpref adds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from kvpref.batch import DEFAULT_MIN_SHARED_TOKENS
from kvpref.errors import InputError
from kvpref.losses import PreferenceLoss, make_loss
from kvpref.modeling.schedules import SCHEDULES
from kvpref.plans import MODES


@dataclass
class PreferenceTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` for preference data.

    `per_device_train_batch_size` counts groups (prompts with all their responses) per device and optimizer step (times
    `gradient_accumulation_steps`, as usual). A step is cut into micro-batches of at most `max_tokens_per_micro_batch`
    tokens, which changes memory and speed but not the gradient.
    """

    loss: str = field(default="dpo", metadata={"help": "Name of the loss: dpo or sft."})
    loss_args: dict[str, Any] | None = field(
        default=None, metadata={"help": "Settings of the loss, such as {'beta': 0.1, 'label_smoothing': 0.0}."}
    )
    mode: str = field(default="two_pass", metadata={"help": f"How batches run: {', '.join(MODES)}."})
    schedule: str = field(default="full", metadata={"help": f"What is kept for backward: {', '.join(SCHEDULES)}."})
    backend: str = field(default="auto", metadata={"help": "Attention backend, or auto."})
    max_tokens_per_micro_batch: int | None = field(
        default=None, metadata={"help": "Token budget of one forward and backward; unique tokens in mode two_pass."}
    )
    min_shared_tokens: int = field(
        default=DEFAULT_MIN_SHARED_TOKENS,
        metadata={"help": "Shared runs shorter than this are repeated instead of shared."},
    )
    max_prefix_depth: int | None = field(
        default=None, metadata={"help": "Deepest segment of the prefix tree; 1 is prompts and responses."}
    )
    compile_layers: bool = field(
        default=False, metadata={"help": "torch.compile the decoder layers; torch_compile=True means the same."}
    )
    sort_window_steps: int = field(
        default=16, metadata={"help": "Groups are sorted by length within this many optimizer steps' worth of data."}
    )
    reference_logps_dir: str | None = field(
        default=None,
        metadata={"help": "Where reference log-probs are kept and looked for; default: OUTPUT_DIR/reference_logps."},
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Not used: kvpref collates whole groups."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Not used: a NaN loss stops the run."})

    def __post_init__(self) -> None:
        if self.torch_compile_backend or self.torch_compile_mode:
            raise InputError(
                "torch_compile_backend and torch_compile_mode are not used: call "
                "kvpref.compile_layers(kvpref.attach(model), backend=..., mode=...) before making the trainer"
            )
        # Compiling the whole model would trace through the passes; the layers are what there is to gain from.
        self.compile_layers, self.torch_compile = self.compile_layers or self.torch_compile, False
        super().__post_init__()
        for name, value, valid in (("mode", self.mode, MODES), ("schedule", self.schedule, SCHEDULES)):
            if value not in valid:
                raise InputError(f"unknown {name} {value!r}; choose from: {', '.join(valid)}")
        if self.gradient_checkpointing and self.gradient_checkpointing_kwargs is None:
            self.gradient_checkpointing_kwargs = {"use_reentrant": False}
        if self.ddp_find_unused_parameters is None:
            # Every trainable parameter takes part in every step; looking for others would walk the graph each time.
            self.ddp_find_unused_parameters = False
        # One process drives one device: DataParallel would scatter a batch that only makes sense whole.
        if self.n_gpu > 1:
            self._n_gpu = 1
        self.make_loss()

    def make_loss(self) -> PreferenceLoss:
        """The loss that `loss` and `loss_args` name.

        Raises:
            InputError: If there is no such loss or setting.
        """
        settings = self.loss_args or {}
        if not isinstance(settings, dict):
            raise InputError(f"loss_args must be a mapping of settings; got {settings!r}")
        return make_loss(self.loss, **settings)
