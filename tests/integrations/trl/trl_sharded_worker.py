"""Run under torchrun by test_sharded: TRL's trainers with sharded weights, and with whole ones under DDP.

The ranks' rows share prompts differently, so that their numbers of passes differ.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import trl
import trl_runs
import trl_tree_rows
import trl_vision_runs
from datasets import Dataset
from deepspeed_runs import deepspeed_config, train_in_float64
from fsdp_on_cpu import let_accelerate_shard
from torch import distributed
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSequenceClassification
from trl.experimental import async_grpo
from two_processes import leave_together

from kvpref.integrations import trl as kvpref_trl
from kvpref.models.partitioned import gathered, is_partitioned

NUM_STEPS = 3


def lora(**options: Any) -> peft.LoraConfig:
    """Not zero at first, or the reference would be the policy."""
    return peft.LoraConfig(r=3, target_modules=["v_proj", "up_proj"], init_lora_weights=False, **options)


def prompts(num_rows: int, rows_per_rank: int = 2) -> list[str]:
    """Rank 0 gets two prompts of two thirds in common, rank 1 prompts too short to be shared; so in turn."""
    words = trl_runs.Words()
    found: list[str] = []
    while len(found) < num_rows:
        trunk = words.text(40, 40)
        found += [f"{trunk} {words.text(20, 30)} " for _ in range(rows_per_rank)]
        found += [words.text(2, 4) + " " for _ in range(rows_per_rank)]
    return found[:num_rows]


def pairs() -> Dataset:
    words = trl_runs.Words(1)
    rows = [{"prompt": p, "chosen": words.text(2, 9), "rejected": words.text(2, 9)} for p in prompts(16)]
    return Dataset.from_list(rows)


def labelled() -> Dataset:
    """Three completions of each prompt, in a row."""
    words = trl_runs.Words(1)
    rows = [
        {"prompt": prompt, "completion": words.text(2, 12), "label": label}
        for prompt in prompts(8, 1)
        for label in (True, False, True)
    ]
    return Dataset.from_list(rows)


def questions() -> Dataset:
    return Dataset.from_list([{"prompt": prompt.strip()} for prompt in prompts(12, 1)])


def share_of_even_words(completions: list[str], **kwargs: Any) -> list[float]:
    numbers = [[int(word[1:]) for word in text.split() if word.startswith("w")] for text in completions]
    return [sum(number % 2 == 0 for number in row) / max(1, len(row)) for row in numbers]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A trainer and what it is given."""

    trainer: str
    data: Callable[[], Dataset]
    settings: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    fsdp: dict[str, Any] = field(default_factory=dict)
    mode: str = "two_pass"
    evaluates: bool = False
    against_trl: bool = False
    layers: tuple[str, ...] = ("LlamaDecoderLayer",)
    vision: str = ""


LORA = {"peft_config": lora(task_type="CAUSAL_LM")}
EVALUATION = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2}
GRPO: dict[str, Any] = {
    "trainer": "GRPO",
    "data": questions,
    "arguments": {"reward_funcs": share_of_even_words},
    "settings": {
        "num_generations": 4,
        "per_device_train_batch_size": 4,
        "max_completion_length": 8,
        "beta": 0.1,
        "num_iterations": 2,
        "shuffle_dataset": False,
    },
}
CASES = {
    "DPO": Case(
        trainer="DPO",
        data=pairs,
        settings={"gradient_accumulation_steps": 2, **EVALUATION},
        evaluates=True,
        against_trl=True,
    ),
    "DPO, LoRA": Case(trainer="DPO", data=pairs, arguments=LORA),
    "KTO": Case(trainer="KTO", data=labelled, settings={"per_device_train_batch_size": 3}),
    "reward model": Case(trainer="Reward", data=pairs, fsdp={"activation_checkpointing": True}),
    "GRPO": Case(**GRPO),
    "DPO, one pass": Case(trainer="DPO", data=pairs, mode="one_pass", settings=EVALUATION, evaluates=True),
    "DPO, LoRA, packed": Case(trainer="DPO", data=pairs, arguments=LORA, mode="packed"),
    "DPO, precomputed": Case(trainer="DPO", data=pairs, settings={"precompute_ref_log_probs": True}),
    "DPO, weights not resharded": Case(
        trainer="DPO", data=pairs, fsdp={"reshard_after_forward": False, "cpu_ram_efficient_loading": True}
    ),
    "KTO, LoRA": Case(trainer="KTO", data=labelled, settings={"per_device_train_batch_size": 3}, arguments=LORA),
    "reward model, LoRA": Case(
        trainer="Reward",
        data=pairs,
        arguments={"peft_config": lora(task_type="SEQ_CLS", modules_to_save=["score"])},
        against_trl=True,
    ),
    "GRPO, LoRA": Case(**{**GRPO, "arguments": {**GRPO["arguments"], **LORA}}),
    "GRPO, one pass": Case(**GRPO, mode="one_pass"),
    "asynchronous GRPO": Case(
        trainer="AsyncGRPO",
        data=questions,
        settings={"dtype": "auto", "token_budget": -1, "per_device_train_batch_size": 5},
    ),
    # In the second step one rank has no images.
    "DPO, images": Case(
        trainer="DPO",
        data=trl_vision_runs.pairs,
        vision="qwen2_5_vl",
        layers=("Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock"),
        settings={"max_length": None, "per_device_train_batch_size": 1, "gradient_checkpointing": False},
    ),
}


def train(case: Case, module: Any, path: str, output: Path, sharding: str = "none") -> dict[str, Any]:
    """Losses, numbers of passes with gradient, and weights.

    Args:
        case: The trainer.
        module: Which package's.
        path: The model's.
        output: An empty folder.
        sharding: ``none``, ``fsdp2``, ``zero2`` or ``zero3``.
    """
    torch.manual_seed(0)  # adapters and scalar heads
    model = load(case, path)
    settings = {
        "per_device_train_batch_size": 2,
        "max_steps": NUM_STEPS,
        # Adam would divide rounding by rounding.
        "optim": "sgd",
        "learning_rate": 0.5,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        **({} if case.trainer.endswith("GRPO") else {"train_sampling_strategy": "sequential"}),
        **case.settings,
    }
    if sharding == "fsdp2":
        layers = {"transformer_layer_cls_to_wrap": list(case.layers)}
        settings |= {"fsdp": True, "fsdp_config": {"version": 2, **layers, **case.fsdp}}
        settings.setdefault("gradient_checkpointing", not case.fsdp)
    if sharding.startswith("zero"):
        settings |= {"deepspeed": deepspeed_config(int(sharding.removeprefix("zero")))}
    configs = async_grpo if case.trainer == "AsyncGRPO" else trl
    args = trl_runs.make_args(getattr(configs, f"{case.trainer}Config"), output, **settings)
    if sharding == "fsdp2":
        let_accelerate_shard()
    with trl_tree_rows.without_cuda_and_server():
        trainer = getattr(module, f"{case.trainer}Trainer")(
            model=model,
            args=args,
            **given(case, output / f"data-{sharding}"),
            **({"mode": case.mode} if module is kvpref_trl else {}),
            **case.arguments,
        )
    if case.trainer == "GRPO":  # ranks decode different numbers of steps
        trainer.generation_config.max_new_tokens = 8 if os.environ["RANK"] == "0" else 5
    passes, before = count_passes(trainer.model), whole_weights(trainer.model)
    found = trl_runs.run(trainer)
    sharded = [isinstance(weight, DTensor) or is_partitioned(weight) for weight in trainer.model.parameters()]
    assert any(sharded) == (sharding in ("fsdp2", "zero3"))
    return {"losses": found.losses, "passes": passes, "before": before, "after": whole_weights(trainer.model)}


def given(case: Case, folder: Path) -> dict[str, Any]:
    """Data and what reads it."""
    if case.trainer == "AsyncGRPO":
        return trl_tree_rows.rollouts()
    return {
        "train_dataset": shared_data(case, folder),
        **({"eval_dataset": case.data().select(range(8))} if case.evaluates else {}),
        "processing_class": trl_vision_runs.make_processor(case.vision) if case.vision else trl_runs.make_tokenizer(),
    }


def shared_data(case: Case, folder: Path) -> Dataset:
    """The data, where all ranks find what one of them adds: reference log-probs."""
    if "precompute_ref_log_probs" not in case.settings:
        return case.data()
    if os.environ["RANK"] == "0":
        case.data().save_to_disk(folder)
    distributed.barrier()
    return Dataset.load_from_disk(folder)


def load(case: Case, path: str) -> Any:
    if case.vision:
        return AutoModelForImageTextToText.from_pretrained(Path(path, case.vision), dtype=torch.float64)
    if case.trainer == "AsyncGRPO":  # loads it itself, in the dtype of the file
        return str(Path(path, "float64"))
    if case.trainer == "Reward":
        return AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float64, num_labels=1)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)


def load_in_float64() -> None:
    """Let references, which ZeRO-3 cuts while they load, stay what the policy is."""
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses

    kind: Any = InsertPostInitMethodToModuleSubClasses
    init = kind.__init__

    def wide(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.dtype = torch.float64

    kind.__init__ = wide


def count_passes(model: torch.nn.Module) -> list[int]:
    layer = next(module for name, module in model.named_modules() if name.endswith("layers.0"))
    calls: list[int] = []
    layer.register_forward_pre_hook(lambda *_: calls.append(1) if torch.is_grad_enabled() else None)
    return calls


def whole_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    with gathered(model.parameters()):
        return {
            name.replace("_checkpoint_wrapped_module.", ""): whole(weight).detach().clone()
            for name, weight in model.named_parameters()
            if weight.requires_grad
        }


def whole(weight: torch.Tensor) -> torch.Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def compare(truth: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """What a sharded run is apart from the same under DDP, on this rank."""
    moved = sum(float((after - truth["before"][name]).norm()) for name, after in truth["after"].items())
    assert sorted(truth["after"]) == sorted(found["after"])
    return {
        "moved": moved,
        "apart": sum(float((after - truth["after"][name]).norm()) for name, after in found["after"].items()),
        "num_passes": len(found["passes"]),
        "losses": found["losses"],
        "true_losses": truth["losses"],
    }


def main(sharding: str, path: str, output: str, *names: str) -> None:
    folder, rank = Path(output), os.environ["RANK"]
    # First: a process that has sharded once does so again.
    truths = {name: train(CASES[name], kvpref_trl, path, folder) for name in names}
    if sharding.startswith("zero"):
        train_in_float64()
        load_in_float64()
    report = {name: compare(truths[name], train(CASES[name], kvpref_trl, path, folder, sharding)) for name in names}
    if sharding == "fsdp2":
        half = Case(trainer="DPO", data=pairs, settings={"bf16": True})
        report["bf16"] = train(half, kvpref_trl, path, folder, sharding)["losses"]
    for name in names:
        if CASES[name].against_trl and sharding == "fsdp2":
            report[name]["trl_losses"] = train(CASES[name], trl, path, folder, sharding)["losses"]
    Path(folder, f"report-{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave_together()
