"""LoRA adapters, through peft: new ones, and those that a folder holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpref.cli.load_reports import NEW_HEAD, without_news
from kvpref.cli.run_config import RunConfig
from kvpref.data import load_tokenizer
from kvpref.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvpref.losses import PreferenceLoss

ADAPTER_FILE = "adapter_config.json"

_TASKS = {
    "tokens": ("CAUSAL_LM", "AutoPeftModelForCausalLM"),
    "ends": ("SEQ_CLS", "AutoPeftModelForSequenceClassification"),
}
"""By what the loss reads: peft's name of the task and its class that loads such a model."""


def is_adapter(source: str) -> bool:
    """Whether `source` is a folder that peft saved an adapter in."""
    return (Path(source) / ADAPTER_FILE).is_file()


def load_adapter(folder: str, *, reads: str, dtype: str, **settings: Any) -> PreTrainedModel:
    """The adapter of a folder, trainable, on the base model that it names.

    Args:
        folder: As `save_pretrained` of a PEFT model writes it.
        reads: ``tokens`` for a causal language model, ``ends`` for one with a scalar head.
        dtype: Of the weights.
        **settings: For loading the base model.

    Raises:
        InputError: If peft is missing, or cannot load the adapter or its base model.
    """
    peft = _import_peft()
    try:
        with without_news(NEW_HEAD if reads == "ends" else {}):  # the adapter holds the head
            model = _load_on_base(peft, folder, reads, dtype=dtype, **settings)
        if reads == "ends" and (Path(folder) / "tokenizer_config.json").is_file():
            # Rewards are read before the padding, and an adapter's folder holds no configuration of the model.
            for config in (model.config, model.config.get_text_config()):
                config.pad_token_id = load_tokenizer(folder).pad_token_id
        return model
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise InputError(
            f"{folder}: cannot load the adapter: {_first_line(error)}; its base model, base_model_name_or_path in "
            f"{ADAPTER_FILE}, must be a folder with weights, or a hub name"
        ) from error


def _load_on_base(peft: Any, folder: str, reads: str, **settings: Any) -> Any:
    """As peft's own classes do, which know no base models that see images."""
    from transformers import AutoConfig

    from kvpref.models.classes import model_class, sees_images

    task, auto_class = _TASKS[reads]
    adapter = read_adapter(folder)
    config = AutoConfig.from_pretrained(adapter.base_model_name_or_path, revision=adapter.revision)
    if not sees_images(config):
        return getattr(peft, auto_class).from_pretrained(folder, is_trainable=True, **settings)
    if adapter.task_type != task:
        raise ValueError(f"it was made for the task {adapter.task_type}, and {task} is asked for")
    kind = model_class(config, reads)
    base = kind.from_pretrained(adapter.base_model_name_or_path, revision=adapter.revision, **settings)
    return peft.PeftModel.from_pretrained(base, folder, is_trainable=True)


def read_adapter(folder: str) -> Any:
    """The `peft.PeftConfig` of an adapter's folder.

    Raises:
        InputError: If peft is missing, or the file cannot be read.
    """
    peft = _import_peft()
    try:
        return peft.PeftConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{Path(folder) / ADAPTER_FILE}: cannot read the adapter: {_first_line(error)}") from error


def refuse_to_plan(folder: str) -> None:
    """Raise InputError if a folder holds an adapter, with what to plan in its place. Reads the file without peft."""
    if not is_adapter(folder):
        return
    try:
        found = json.loads((Path(folder) / ADAPTER_FILE).read_text())
    except (OSError, ValueError):
        found = {}
    rank, modules = found.get("r"), found.get("target_modules")
    lora = "" if rank is None else f" --lora-r {rank}"
    if lora and isinstance(modules, list) and modules:
        lora += f" --lora-target-modules {','.join(sorted(modules))}"
    base = found.get("base_model_name_or_path") or "BASE_MODEL"
    raise InputError(f"{folder}: holds an adapter; name its base model in its place: kvpref plan {base}{lora} ...")


def put_on(model: PreTrainedModel, adapter: Any) -> PreTrainedModel:
    """`model` with an adapter of this configuration, whose weights are new.

    Raises:
        InputError: If it does not fit the model.
    """
    try:
        return _import_peft().get_peft_model(model, adapter)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"the adapter does not fit its base model: {_first_line(error)}") from error


def add_lora(model: PreTrainedModel, run: RunConfig, loss: PreferenceLoss) -> PreTrainedModel:
    """`model` with a new LoRA adapter, the only part that is trained, with the scalar or value head where there is one.

    Args:
        model: A model without adapter.
        run: Names rank, scale and modules.
        loss: What the model is trained with.

    Raises:
        InputError: If peft is missing, a module does not exist, or the adapter could not be loaded again.
    """
    from kvpref.models.lora_targets import ALL_LINEAR, find_targets
    from kvpref.models.value_head import VALUE_HEAD

    peft = _import_peft()
    assert run.lora_r is not None
    if run.model is None:
        raise InputError(
            "lora_r with --model-config: an adapter is saved without its base model, whose random weights would be "
            "lost; give a MODEL with weights"
        )
    if is_adapter(run.model):
        raise InputError(f"{run.model}: holds an adapter, which is trained further; leave --lora-r out")
    config = peft.LoraConfig(
        task_type=_TASKS[loss.reads][0],
        modules_to_save=[VALUE_HEAD] if loss.head.values else None,
        r=run.lora_r,
        lora_alpha=2 * run.lora_r if run.lora_alpha is None else run.lora_alpha,
        target_modules=find_targets(model, run.lora_target_modules or ALL_LINEAR),
    )
    return peft.get_peft_model(model, config)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise InputError(f'adapters need peft ({error}); pip install "kvpref[peft]"') from error
    return peft
