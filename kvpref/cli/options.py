"""Options that several commands have: one name means one thing, with one default.

Used as ``dtype: Annotated[str, DTYPE] = DEFAULT_DTYPE``. Where a command needs to know what was given, its default is
None, and ``show_default`` says what that stands for.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import typer

from kvpref.cli.choices import chosen
from kvpref.cli.name_checks import known_loss
from kvpref.errors import InputError

DATA_PANEL, MODEL_PANEL, TRAINING_PANEL = "Data", "Model", "Training"
MEMORY_PANEL, SAVING_PANEL, RANKS_PANEL = "Memory", "Saving and logging", "Several processes"

DEFAULT_DTYPE = "float32"
DEFAULT_MODE = "two_pass"
DEFAULT_SCHEDULE = "full"
DEFAULT_CHECKPOINT = "none"
DEFAULT_PREFIX_CACHE = "device"
DEFAULT_LOSS = "dpo"
DEFAULT_ON_BAD_ROW = "stop"
DEFAULT_TRAJECTORY_GROUPS = "task"
DEFAULT_BATCH_SIZE = 8

MODEL = typer.Argument(help="Folder or hub name.")
MODEL_OR_CONFIG = typer.Argument(help="Folder, hub name, or CONFIG.json for random weights.")
DATA = typer.Argument(help="Files (.jsonl, .json, .csv, .parquet), folders, patterns or hub names, also NAME:SPLIT.")


def _refuse_yaml(file: str | None) -> str | None:
    if file is not None and file.endswith((".yaml", ".yml")):
        raise InputError(f"--model-config {file}: expected the JSON of a model; the YAML of a run is given to --config")
    return file


MODEL_CONFIG = typer.Option(
    callback=_refuse_yaml,
    help="JSON of a model to start from random weights, instead of MODEL.",
    show_default="none",
    rich_help_panel=MODEL_PANEL,
)
MODEL_NAME_OR_PATH = typer.Option(help="As MODEL.", show_default="MODEL", rich_help_panel=MODEL_PANEL)
DATASET_NAME = typer.Option(help="As DATA.", show_default="DATA", rich_help_panel=DATA_PANEL)
TOKENIZER = typer.Option(help="Folder or hub name.", show_default="the model's own", rich_help_panel=MODEL_PANEL)
DTYPE = typer.Option(
    help="Of the weights: float32, bfloat16, float16 (fp32, bf16, fp16), auto.",
    show_default=DEFAULT_DTYPE,
    callback=chosen("dtype"),
    rich_help_panel=MODEL_PANEL,
)
BF16 = typer.Option(
    "--bf16/--no-bf16",
    help="bf16 autocast over float32 weights.",
    show_default="where the GPU has it",
    rich_help_panel=MODEL_PANEL,
)
LORA_R = typer.Option(
    help="Train a LoRA adapter of this rank.", show_default="none, all weights", rich_help_panel=MODEL_PANEL
)
LORA_ALPHA = typer.Option(
    help="LoRA's scale is this over the rank.", show_default="twice the rank", rich_help_panel=MODEL_PANEL
)
LORA_TARGET_MODULES = typer.Option(
    help="Modules with LoRA, such as q_proj,v_proj.",
    show_default="all linear ones of the text",
    rich_help_panel=MODEL_PANEL,
)
FREEZE_VISION = typer.Option(
    "--freeze-vision",
    help="Train nothing of the vision tower and its projector.",
    show_default="as the model loads",
    rich_help_panel=MODEL_PANEL,
)

NUM_PROCESSES = typer.Option(
    help="Start so many on this machine.", show_default="1, or those of torchrun", rich_help_panel=RANKS_PANEL
)
ACCELERATE_CONFIG = typer.Option(
    help="How they share the work: ddp, fsdp2, zero1, zero2, zero3, or a file of accelerate's.",
    show_default="ddp",
    rich_help_panel=RANKS_PANEL,
)

SPLIT = typer.Option(
    help="Split of DATA, or a slice of it: test, train[:1000], [10%:20%].",
    show_default="train, or the only one",
    rich_help_panel=DATA_PANEL,
)
COLUMN = typer.Option(
    help="Read a column under another name: prompt=question.", show_default="none", rich_help_panel=DATA_PANEL
)
GROUP_BY = typer.Option(
    help="Column whose equal values make one group of rows with one response each.",
    show_default="the prompt",
    rich_help_panel=DATA_PANEL,
)
DATA_WEIGHTS = typer.Option(
    help="Shares of several DATA in an epoch, such as 2,1.", show_default="every row once", rich_help_panel=DATA_PANEL
)
MAX_PROMPT_TOKENS = typer.Option(
    help="Keep the end of longer prompts.", show_default="no limit", rich_help_panel=DATA_PANEL
)
MAX_RESPONSE_TOKENS = typer.Option(
    help="Keep the start of longer responses.", show_default="no limit", rich_help_panel=DATA_PANEL
)
MAX_IMAGE_PIXELS = typer.Option(
    help="Scale down larger images.", show_default="no limit but the processor's", rich_help_panel=DATA_PANEL
)
ON_BAD_ROW = typer.Option(
    help="stop, or skip and list it.",
    show_default=DEFAULT_ON_BAD_ROW,
    callback=chosen("on_bad_row"),
    rich_help_panel=DATA_PANEL,
)
TRAJECTORY_GROUPS = typer.Option(
    help="What makes a group of trajectories: task, or turn (answers to one history).",
    show_default=DEFAULT_TRAJECTORY_GROUPS,
    callback=chosen("trajectory_groups"),
    rich_help_panel=DATA_PANEL,
)

LOSS = typer.Option(
    help="One of `kvpref losses`, or yours: FILE.py:FUNCTION.",
    show_default=DEFAULT_LOSS,
    callback=known_loss,
    rich_help_panel=TRAINING_PANEL,
)
MODE = typer.Option(
    help="two_pass, one_pass, packed, padded.",
    show_default=DEFAULT_MODE,
    callback=chosen("mode"),
    rich_help_panel=TRAINING_PANEL,
)
BATCH_SIZE = typer.Option(
    help="Prompts, each with all its responses, per device and step.",
    show_default=str(DEFAULT_BATCH_SIZE),
    rich_help_panel=TRAINING_PANEL,
)
MAX_TOKENS = typer.Option(
    help="Token budget of a micro-batch, counted as the mode counts.",
    show_default="8192, or the largest prompt with its responses; train on CUDA: what fits",
    rich_help_panel=MEMORY_PANEL,
)
SCHEDULE = typer.Option(
    help="full, or bounded: memory does not grow with the responses.",
    show_default=DEFAULT_SCHEDULE,
    callback=chosen("schedule"),
    rich_help_panel=MEMORY_PANEL,
)
MAX_TOKENS_PER_CHUNK = typer.Option(
    help="bounded: most tokens whose activations are held.", show_default="8192", rich_help_panel=MEMORY_PANEL
)
PREFIX_CACHE = typer.Option(
    help="bounded: keys and values on device or cpu.",
    show_default=DEFAULT_PREFIX_CACHE,
    callback=chosen("prefix_cache"),
    rich_help_panel=MEMORY_PANEL,
)
CHECKPOINT = typer.Option(
    help="Compute activations again: none, prefix, all.",
    show_default=DEFAULT_CHECKPOINT,
    callback=chosen("checkpoint"),
    rich_help_panel=MEMORY_PANEL,
)
SEQUENCE_PARALLEL = typer.Option(
    help="Ranks that share each micro-batch, splitting its tokens and the prefixes' keys and values.",
    show_default="1",
    rich_help_panel=MEMORY_PANEL,
)


def of_run(option: Any) -> Any:
    """An option whose default is what the run that made MODEL had."""
    found = copy(option)
    found.show_default = f"that of MODEL's run.yaml, else {option.show_default}"
    return found


JSON = typer.Option("--json", help="One JSON object on the last line of stdout.", rich_help_panel=SAVING_PANEL)


def check_counts(**counts: int | None) -> None:
    """Raise InputError for the first count below 1, by its option's name; None stands for a default."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1; got {count}")
