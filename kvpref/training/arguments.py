"""Training arguments: those of transformers plus kvpref's."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from transformers import SchedulerType, TrainingArguments
from transformers.training_args import ParallelMode
from transformers.utils.import_utils import is_torch_xla_available

from kvpref.data.batching.budgets import DEFAULT_MAX_TOKENS
from kvpref.engine.options import PREFIX_CACHES, SCHEDULES, EngineOptions
from kvpref.errors import InputError
from kvpref.losses import PreferenceLoss, make_loss
from kvpref.models.checkpointing import CHECKPOINTS
from kvpref.models.precision import device_has_bf16
from kvpref.parallel.deepspeed_limits import prepare_deepspeed
from kvpref.plan.modes import MODES
from kvpref.plan.sharing import DEFAULT_MIN_SHARED_TOKENS
from kvpref.ranks import check_all_joined, check_start
from kvpref.training.argument_checks import check_arguments, check_sequence_parallel
from kvpref.training.defaults import AUTO, check_token_budget, default_workers
from kvpref.training.fsdp_settings import is_fsdp_asked, settle_fsdp

REFERENCES = ("start", "base")


def check_processes(args: TrainingArguments) -> None:
    """Raise InputError unless all started processes train together."""
    alone = (ParallelMode.NOT_PARALLEL, ParallelMode.NOT_DISTRIBUTED)
    check_all_joined(args.world_size, is_distributed=args.parallel_mode not in alone)


@dataclass
class PreferenceTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` for preference data.

    `per_device_train_batch_size` counts groups (prompts with all their responses) per device and optimizer step (times
    `gradient_accumulation_steps`, as usual). A step is cut into micro-batches of at most `max_tokens_per_micro_batch`
    tokens, which changes memory and speed but not the gradient.
    """

    loss: str = field(
        default="dpo",
        metadata={"help": "A loss that `kvpref losses` lists, or yours: FILE.py:FUNCTION, package.module:FUNCTION."},
    )
    loss_args: dict[str, Any] | None = field(
        default=None, metadata={"help": "Settings of the loss, such as {'beta': 0.1, 'label_smoothing': 0.0}."}
    )
    mode: str = field(default="two_pass", metadata={"help": f"How batches run: {', '.join(MODES)}."})
    schedule: str = field(default="full", metadata={"help": f"What is kept for backward: {', '.join(SCHEDULES)}."})
    max_tokens_per_chunk: int | None = field(
        default=None, metadata={"help": "Schedule bounded: most tokens whose activations are held at once (8192)."}
    )
    prefix_cache: str = field(
        default="device",
        metadata={"help": f"Schedule bounded: where prefixes' keys and values are kept: {', '.join(PREFIX_CACHES)}."},
    )
    checkpoint: str = field(
        default="none",
        metadata={
            "help": f"Passes that recompute their activations: {', '.join(CHECKPOINTS)}; "
            "gradient_checkpointing=True means all."
        },
    )
    prefix_grad: bool = field(
        default=True, metadata={"help": "False stops gradients at the prompts' keys and values: an approximation."}
    )
    gather_weights: str = field(
        default="chunk",
        metadata={
            "help": "Sharded model, schedule bounded: weights stay gathered for a chunk's pass (chunk) or the whole "
            "step (step)."
        },
    )
    reduce_grads: str = field(
        default="chunk",
        metadata={
            "help": "Sharded model: average gradients after each chunk or micro-batch (chunk), or once per step, "
            "and hold whole ones until then (step)."
        },
    )
    freeze_vision: bool = field(
        default=False,
        metadata={"help": "Train nothing of a vision tower and its projector; False leaves them as the model loads."},
    )
    router_aux_loss_coef: float | None = field(
        default=None,
        metadata={
            "help": "Factor on the load-balancing loss of a mixture of experts, which is added to each micro-batch's "
            "loss (TRL: router_aux_loss_coef); None leaves it out."
        },
    )
    sequence_parallel: int = field(
        default=1,
        metadata={
            "help": "Ranks that share each micro-batch: they split its tokens, and attention with its keys and values "
            "by heads. Must divide the number of processes and of the model's key/value heads."
        },
    )
    share_across_micro_batches: bool = field(
        default=True,
        metadata={"help": "Schedule bounded: encode what micro-batches of a step share once per step."},
    )
    auto_budget: bool = field(
        default=False,
        metadata={"help": "Schedule bounded: when memory runs out, halve the chunk and repeat the step."},
    )
    backend: str = field(default="auto", metadata={"help": "Attention backend, or auto."})
    max_tokens_per_micro_batch: int | Literal["auto"] | None = field(
        default=AUTO,
        metadata={
            "help": "Token budget of one forward and backward, unique tokens in mode two_pass; None puts no bound. "
            f"auto is {DEFAULT_MAX_TOKENS} or what the largest group takes, and no bound for losses that couple groups."
        },
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
    reference: str = field(
        default="start",
        metadata={
            "help": "The reference where no second model is given: start, the model as it is before training (with "
            "PEFT: with the adapter as it was loaded; a new adapter does nothing yet), or base, with PEFT the model "
            "without its adapter."
        },
    )
    reference_model: str | None = field(
        default=None, metadata={"help": "Folder or hub name of another reference; loaded in the model's dtype."}
    )
    reference_device: str | None = field(
        default=None,
        metadata={"help": "Where a second model stays and runs, such as cpu or cuda:1; default: the training device."},
    )
    precompute_reference: bool = field(
        default=True,
        metadata={
            "help": "Compute reference log-probs once and store them (TRL: precompute_ref_log_probs). False computes "
            "them batch by batch: with the adapter off or a copy of it (PEFT), with reference_model, or with a copy "
            "of the model."
        },
    )
    reference_logps_dir: str | None = field(
        default=None,
        metadata={"help": "Where reference log-probs are kept and looked for; default: OUTPUT_DIR/reference_logps."},
    )
    reference_sync_steps: int | None = field(
        default=None,
        metadata={
            "help": "TR-DPO: every so many optimizer steps the reference's weights become alpha * policy + (1 - "
            "alpha) * reference (TRL: sync_ref_model, ref_model_sync_steps). Needs precompute_reference=False."
        },
    )
    reference_sync_alpha: float = field(
        default=0.6,
        metadata={
            "help": "The policy's share at a sync, in (0, 1]; 1 replaces the reference (TRL: ref_model_mixup_alpha)."
        },
    )
    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Peak learning rate; default: by loss and adapter, see `kvpref losses NAME`."}
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the data."})
    lr_scheduler_type: SchedulerType | str = field(
        default="cosine", metadata={"help": "How the learning rate falls after the warmup."}
    )
    warmup_steps: float = field(
        default=0.1, metadata={"help": "Steps in which the learning rate rises; below 1: their share of all steps."}
    )
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "bf16 autocast; default: on GPUs that compute in bf16, unless fp16 is set."},
    )
    dataloader_num_workers: int = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Processes that plan ahead; 0: a thread; default: 1 for a GPU, else 0."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Not used: kvpref collates whole groups."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Not used: a NaN loss stops the run."})

    def __post_init__(self) -> None:
        check_arguments(self)
        if self.torch_compile_backend or self.torch_compile_mode:
            raise InputError(
                "torch_compile_backend and torch_compile_mode are not used: call "
                "kvpref.compile_layers(kvpref.attach(model), backend=..., mode=...) before making the trainer"
            )
        # Compiling the whole model would trace through the passes; only compiling the layers gains anything.
        self.compile_layers, self.torch_compile = self.compile_layers or self.torch_compile, False
        if self.gradient_checkpointing and self.gradient_checkpointing_kwargs in (None, {"use_reentrant": False}):
            self.gradient_checkpointing, self.checkpoint = False, "all"
        on_cpu = self._choose_device()
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = default_workers(on_cpu=on_cpu)
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not on_cpu and device_has_bf16()
        super().__post_init__()
        check_processes(self)
        settle_fsdp(self)
        check_sequence_parallel(self, self.sequence_parallel)
        if self.deepspeed_plugin is not None:
            prepare_deepspeed(self.deepspeed_plugin)
        check_token_budget(self.max_tokens_per_micro_batch)
        self._check_reference()
        options = self.engine_options()
        if self.auto_budget and self.sequence_parallel > 1:
            raise InputError(
                "auto_budget repeats a step that ran out of memory, and with sequence_parallel the ranks of a group "
                "wait for one another inside it; set max_tokens_per_chunk"
            )
        if self.auto_budget and (options.schedule != "bounded" or self.gradient_accumulation_steps > 1):
            raise InputError(
                "auto_budget repeats a step with smaller chunks: it needs schedule 'bounded' and "
                "gradient_accumulation_steps 1 (max_tokens_per_micro_batch cuts large steps)"
            )
        if self.auto_budget and (self.deepspeed_plugin is not None or self._waits_in_chunks()):
            raise InputError(
                "auto_budget repeats a step that ran out of memory on one rank, and ranks of a sharded model wait for "
                "one another inside it; with FSDP2 set gather_weights and reduce_grads to 'step', or set "
                "max_tokens_per_chunk instead"
            )
        # One process drives one device: DataParallel would split a batch that only makes sense as a whole.
        if self.n_gpu > 1:
            self._n_gpu = 1
        self.make_loss()

    @property
    def num_data_ranks(self) -> int:
        """The number of groups of ranks that get separate micro-batches."""
        return self.world_size // self.sequence_parallel

    @property
    def data_rank(self) -> int:
        """The number of this rank's group."""
        return self.process_index // self.sequence_parallel

    def _choose_device(self) -> bool:
        """Use the CPU if there is no other device; returns whether it is used.

        Unless told, accelerate starts no process group there, and each process of a torchrun trains alone.
        """
        num_devices = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
        if num_devices == 0 and not is_torch_xla_available():
            self.use_cpu = True
        on_cpu = self.use_cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on")
        check_start(0 if on_cpu else num_devices)
        return on_cpu

    def _waits_in_chunks(self) -> bool:
        return is_fsdp_asked(self) and "chunk" in (self.gather_weights, self.reduce_grads)

    def _check_reference(self) -> None:
        if self.reference not in REFERENCES:
            raise InputError(f"unknown reference {self.reference!r}; choose from: {', '.join(REFERENCES)}")
        if not 0 < self.reference_sync_alpha <= 1:
            raise InputError(f"reference_sync_alpha must be in (0, 1]; got {self.reference_sync_alpha}")
        if self.reference_sync_steps is None:
            return
        if self.reference_sync_steps < 1:
            raise InputError(f"reference_sync_steps must be at least 1; got {self.reference_sync_steps}")
        if self.precompute_reference:
            raise InputError(
                "reference_sync_steps changes the reference during training; set precompute_reference=False"
            )

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Warmup steps. If given as a share, at least one step with a nonzero learning rate remains."""
        num_steps = super().get_warmup_steps(num_training_steps)
        return num_steps if self.warmup_steps >= 1 else min(num_steps, max(0, num_training_steps - 1))

    def engine_options(self) -> EngineOptions:
        """How forward and backward run.

        Raises:
            InputError: If an option is unknown or does not fit the others.
        """
        return EngineOptions(**{item.name: getattr(self, item.name) for item in fields(EngineOptions)})

    def make_loss(self) -> PreferenceLoss:
        """The loss that `loss` and `loss_args` name.

        Raises:
            InputError: If there is no such loss or setting.
        """
        settings = self.loss_args or {}
        if not isinstance(settings, dict):
            raise InputError(f"loss_args must be a mapping of settings; got {settings!r}")
        return make_loss(self.loss, **settings)
