"""What a reader of a page has at hand: files in the working folder, and names that its fragments use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import preference_runs
import torch
from chat_families import build_tokenizer
from tiny_experts import BALANCED, tiny_experts
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import kvpref

PAIRS = [{"prompt": "2+2? ", "chosen": "4", "rejected": "5"}, {"prompt": "1+4? ", "chosen": "5", "rejected": "four"}]
GROUPS = [{"prompt": "2+2? ", "responses": ["4", "5", "22"], "scores": [1, 0, 0.5]}]


def write_files(folder: Path) -> None:
    """`my-model` with a tokenizer, `pairs.jsonl` and `groups.jsonl`."""
    tokenizer = build_tokenizer("chatml")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "my-model")
    tokenizer.save_pretrained(folder / "my-model")
    for name, rows in {"pairs.jsonl": PAIRS, "groups.jsonl": GROUPS}.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def _model_and_batches(folder: Path) -> dict[str, Any]:
    model = kvpref.attach(preference_runs.make_model())
    groups = preference_runs.make_groups()
    batches = [kvpref.collate(groups[:4]), kvpref.collate(groups[4:8])]
    loss = preference_runs.reference_free_loss
    names = {"kvpref": kvpref, "torch": torch, "model": model, "groups": groups, "loss": loss, "loss_fn": loss}
    return {**names, "batches": batches, "batch": batches[0]}


def _experts_and_batch(folder: Path) -> dict[str, Any]:
    names = _model_and_batches(folder)
    return {**names, "model": kvpref.attach(tiny_experts(BALANCED[0]))}


def _trainer_and_rows(folder: Path) -> dict[str, Any]:
    args = preference_runs.make_args(str(folder / "out"))
    model, tokenizer = LlamaForCausalLM.from_pretrained("my-model"), AutoTokenizer.from_pretrained("my-model")
    names = {"PreferenceTrainer": kvpref.PreferenceTrainer, "args": args, "model": model}
    return {**names, "rows": PAIRS, "tokenizer": tokenizer}


def _padded_rows(folder: Path) -> dict[str, Any]:
    model = LlamaForCausalLM.from_pretrained("my-model")
    ids = torch.randint(2, 32, (2, 40))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = SimpleNamespace(train=lambda: model(**batch).loss.backward())
    return {"model": model, "trainer": trainer, "batches": [batch], "optimizer": optimizer}


def _reward_adapter(folder: Path) -> dict[str, Any]:
    from peft import LoraConfig, PeftModel, TaskType, get_peft_model

    settings = LoraConfig(task_type=TaskType.SEQ_CLS, target_modules=["q_proj"])
    base = AutoModelForSequenceClassification.from_pretrained("my-model", num_labels=1)
    get_peft_model(base, settings).save_pretrained("out")
    tokenizer = AutoTokenizer.from_pretrained("my-model")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained("out")
    names = {"AutoModelForSequenceClassification": AutoModelForSequenceClassification, "PeftModel": PeftModel}
    return {**names, "AutoTokenizer": AutoTokenizer, "base": "my-model"}


def _image_rows(folder: Path) -> dict[str, Any]:
    from image_processors import build_processor
    from PIL import Image

    from kvpref.data import load_preferences

    Image.new("RGB", (32, 32)).save(folder / "1.png")
    row = {"prompt": "Which shape?", "images": ["1.png"], "chosen": "A circle.", "rejected": "A square."}
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    return {"load_preferences": load_preferences, "processor": build_processor("llava")}


BEGINNINGS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "docs/data.md": _trainer_and_rows,
    "docs/experts.md": _experts_and_batch,
    "docs/images.md": _image_rows,
    "docs/memory.md": _model_and_batches,
    "docs/references.md": _reward_adapter,
    "docs/trl.md": _padded_rows,
}
