"""AsyncGRPOTrainer on rollouts that are there already, against TRL's own trainer, whose kernel has a stand-in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs the extra kvpref[trl]")
peft = pytest.importorskip("peft", reason="needs the extra kvpref[peft]")

import torch  # noqa: E402
import trl_runs  # noqa: E402
import trl_tree_rows  # noqa: E402
from tiny_hybrids import tiny_hybrid  # noqa: E402
from trl.experimental import async_grpo  # noqa: E402
from trl.trainer.utils import FusedCausalLMOutput  # noqa: E402

from kvpref.integrations import trl as kvpref_trl  # noqa: E402

NUM_STEPS = 5


def make_trainer(trainer_class: Any, path: str, output: Path, setup: dict[str, Any]) -> Any:
    setup = {"dtype": "float32", "token_budget": 220, "temperature": 0.7, "gradient_checkpointing": False, **setup}
    arguments = {name.lower(): setup.pop(name) for name in list(setup) if name.isupper()}
    args = trl_runs.make_args(async_grpo.AsyncGRPOConfig, output, max_steps=NUM_STEPS, **setup)
    with trl_tree_rows.without_cuda_and_server():
        return trainer_class(path, args=args, **trl_tree_rows.rollouts(), **arguments)


SETUPS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "fixed counts": {"token_budget": -1, "per_device_train_batch_size": 5},
    "accumulation and checkpointing": {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
    "LoRA": {"PEFT_CONFIG": peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["v_proj", "up_proj"])},
}


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", SETUPS)
def test_every_setup_gives_trls_numbers(name: str, tmp_path: Path) -> None:
    path = trl_runs.save_model(tmp_path / "model")
    with trl_tree_rows.stand_in_kernel():
        truth = trl_runs.run(make_trainer(async_grpo.AsyncGRPOTrainer, path, tmp_path, SETUPS[name]))
    found = trl_runs.run(make_trainer(kvpref_trl.AsyncGRPOTrainer, path, tmp_path, SETUPS[name]))
    trl_runs.assert_same(found, truth, num_steps=NUM_STEPS)
    # TRL shares too, but for the tokens before branches; kvpref repeats runs that are too short.
    assert found.num_layer_tokens < 1.1 * truth.num_layer_tokens


def add_naive_head(model: Any, temperature: float, outputs: tuple[str, ...], mode: str) -> None:
    """The model's own forward of each segment's path alone."""
    model.set_attn_implementation("eager")

    def forward(input_ids: Any, shift_labels: Any, tree_kv_index: Any, **tree: Any) -> Any:
        ids, labels = input_ids[0], shift_labels[0]
        paths = tree_kv_index.split(tree["tree_cu_seqlens_k"].diff().tolist())
        logits = [plain(input_ids=ids[path][None], use_cache=False).logits[0] for path in paths]
        lengths = tree["tree_cu_seqlens_q"].diff().tolist()
        own = torch.cat([row[-length:] for row, length in zip(logits, lengths, strict=True)]) / temperature
        logps, mask = own.log_softmax(-1), labels != -100
        found = logps.gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
        entropy = -(logps.exp() * logps).sum(1)
        return FusedCausalLMOutput(log_probs=(found * mask)[None], entropy=(entropy * mask)[None])

    plain, model.forward = model.forward, lambda fused_lm_head, **inputs: forward(**inputs)


class NaiveTrainer(kvpref_trl.AsyncGRPOTrainer):
    _add_head = staticmethod(add_naive_head)


@pytest.mark.parametrize("name", ["Lfm2", "Qwen3_5Text"])
def test_layers_that_trl_refuses_train_as_if_each_sample_were_alone(name: str, tmp_path: Path) -> None:
    path = str(tmp_path / "model")
    model = tiny_hybrid(name)
    model.save_pretrained(path)
    with pytest.raises(ValueError, match=r"layers. Tree packing only routes attention layers"):
        make_trainer(async_grpo.AsyncGRPOTrainer, path, tmp_path, {})
    truth = trl_runs.run(make_trainer(NaiveTrainer, path, tmp_path, {}))
    trainer = make_trainer(kvpref_trl.AsyncGRPOTrainer, path, tmp_path, {})
    assert trainer.model.config.layer_types == model.config.layer_types
    trl_runs.assert_same(trl_runs.run(trainer), truth, num_steps=NUM_STEPS)
