"""Which reference a run compares with: another model, a copy, one that follows the policy; temperature; resuming."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from preference_runs import make_args, make_groups, make_model
from reference_runs import make_trainer, reference_logps, relative_error, token_logps
from torch import nn
from transformers import GPT2LMHeadModel, TrainerCallback

import kvpref
from kvpref.training.references.choice import CHECKPOINT_FILE

LOG_TWO = 0.6931471805599453  # logged losses are float32
# float64 model: only the order of sums differs.
TOLERANCE = 1e-10

ENGINES: list[dict[str, Any]] = [
    {"mode": "two_pass"},
    {"mode": "one_pass"},
    {"mode": "packed"},
    {"mode": "padded"},
    {"schedule": "bounded", "max_tokens_per_chunk": 16},
]
ENGINE_NAMES = ["two_pass", "one_pass", "packed", "padded", "bounded"]


def first_loss(trainer: kvpref.PreferenceTrainer) -> float:
    return trainer.state.log_history[0]["loss"]


class _Record(TrainerCallback):
    """The policy's weights after every optimizer step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        self.weights.append({name: item.detach().clone() for name, item in model.named_parameters()})


@pytest.mark.thinned(3)
@pytest.mark.parametrize("engine", ENGINES, ids=ENGINE_NAMES)
@pytest.mark.parametrize("precompute", [True, False], ids=["precomputed", "online"])
def test_the_start_stays_the_reference(tmp_path: Path, precompute: bool, engine: dict[str, Any]) -> None:
    trainer = make_trainer(tmp_path, precompute_reference=precompute, **engine)
    trainer.train()
    assert first_loss(trainer) == pytest.approx(LOG_TWO, abs=1e-7)
    expected = token_logps(make_model())
    assert relative_error(reference_logps(trainer), expected) < TOLERANCE
    assert relative_error(token_logps(trainer.model), expected) > 1e-3, "training must have moved the policy"


@pytest.mark.thinned(2)
@pytest.mark.parametrize("settings", [{"precompute_reference": False}, {}], ids=["online", "precomputed"])
@pytest.mark.parametrize("is_named", [True, False], ids=["by name", "object"])
def test_a_second_model(tmp_path: Path, is_named: bool, settings: dict[str, Any]) -> None:
    given: Any = make_model(seed=5)
    if is_named:
        given.save_pretrained(tmp_path / "reference")
        given = str(tmp_path / "reference")
    trainer = make_trainer(tmp_path / "run", reference_model=given, reference_device="cpu", **settings)
    trainer.train()
    assert first_loss(trainer) != pytest.approx(LOG_TWO, abs=1e-4)
    assert relative_error(reference_logps(trainer), token_logps(make_model(seed=5))) < TOLERANCE


def test_online_and_precomputed_train_alike(tmp_path: Path) -> None:
    runs = [
        make_trainer(tmp_path / str(precompute), precompute_reference=precompute, reference_model=make_model(seed=5))
        for precompute in (True, False)
    ]
    for run in runs:
        run.train()
    assert relative_error(token_logps(runs[0].model), token_logps(runs[1].model)) < TOLERANCE


def test_a_precomputed_second_model_is_dropped(tmp_path: Path) -> None:
    make_model(seed=5).save_pretrained(tmp_path / "reference")
    gc.collect()
    before = sum(isinstance(item, GPT2LMHeadModel) for item in gc.get_objects())
    trainer = make_trainer(tmp_path / "run", reference_model=str(tmp_path / "reference"))
    trainer.train()
    gc.collect()
    assert sum(isinstance(item, GPT2LMHeadModel) for item in gc.get_objects()) == before + 1  # the policy


@pytest.mark.parametrize(("alpha", "num_steps"), [(0.6, 2), (1.0, 3)], ids=["soft", "hard"])
def test_reference_sync(tmp_path: Path, alpha: float, num_steps: int) -> None:
    record = _Record()
    trainer = make_trainer(
        tmp_path,
        precompute_reference=False,
        reference_sync_steps=num_steps,
        reference_sync_alpha=alpha,
        max_steps=5,
        callbacks=[record],
    )
    trainer.train()
    reference = make_model()
    with torch.no_grad():
        for step, weights in enumerate(record.weights, start=1):
            for name, item in reference.named_parameters():
                if step % num_steps == 0:
                    item.copy_(alpha * weights[name] + (1 - alpha) * item)
    expected = token_logps(reference)
    assert relative_error(reference_logps(trainer), expected) < TOLERANCE
    assert relative_error(expected, token_logps(make_model())) > 1e-3
    assert relative_error(expected, token_logps(trainer.model)) > 1e-4


def test_sync_of_an_adapter_replaces_the_copy(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs the extra kvpref[peft]")
    config = peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["ln_f"])
    model = peft.get_peft_model(make_model(), config).double()
    record = _Record()
    settings: dict[str, Any] = {"precompute_reference": False, "reference_sync_steps": 3, "max_steps": 4}
    trainer = make_trainer(tmp_path, model, reference_sync_alpha=1.0, callbacks=[record], **settings)
    trainer.train()
    found = reference_logps(trainer)
    model.load_state_dict(record.weights[2], strict=False)
    assert relative_error(found, token_logps(model)) < TOLERANCE
    assert relative_error(found, token_logps(make_model())) > 1e-4
    with pytest.raises(kvpref.InputError, match="factors of two adapters"):
        make_trainer(tmp_path, model, reference_sync_alpha=0.5, **settings)


@pytest.mark.thinned(1)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"precompute_reference": False},
        {"precompute_reference": False, "reference_sync_steps": 2, "reference_sync_alpha": 0.6},
    ],
    ids=["precomputed", "online", "synced"],
)
def test_resume_repeats_the_uninterrupted_run(tmp_path: Path, settings: dict[str, Any]) -> None:
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, **settings}
    whole = make_trainer(tmp_path, reference_model=make_model(seed=5), **settings)
    whole.train()
    resumed = make_trainer(tmp_path, reference_model=make_model(seed=5), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(token_logps(resumed.model), token_logps(whole.model))
    assert torch.equal(reference_logps(resumed), reference_logps(whole))


@pytest.mark.full
def test_resuming_with_another_reference_is_refused(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "precompute_reference": False}
    make_trainer(tmp_path, **settings).train()
    checkpoint = tmp_path / "checkpoint-1"
    moved = GPT2LMHeadModel.from_pretrained(checkpoint, dtype=torch.float64)
    for model, reference in ((moved, None), (make_model(), make_model(seed=5))):
        with pytest.raises(kvpref.InputError, match="another reference"):
            make_trainer(tmp_path, model, reference_model=reference, **settings).train(str(checkpoint))


def test_resuming_without_the_synced_weights_is_refused(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "precompute_reference": False}
    make_trainer(tmp_path, reference_sync_steps=1, **settings).train()
    checkpoint = tmp_path / "checkpoint-1"
    with pytest.raises(kvpref.InputError, match="reference_sync_steps that this checkpoint"):
        make_trainer(tmp_path, **settings).train(str(checkpoint))
    (checkpoint / CHECKPOINT_FILE).unlink()
    with pytest.raises(kvpref.InputError, match="cannot read the reference"):
        make_trainer(tmp_path, reference_sync_steps=1, **settings).train(str(checkpoint))


@pytest.mark.thinned(2)
@pytest.mark.parametrize("precompute", [True, False], ids=["precomputed", "online"])
@pytest.mark.parametrize("engine", ENGINES[::4], ids=ENGINE_NAMES[::4])
def test_the_reference_has_the_temperature_of_the_loss(
    tmp_path: Path, engine: dict[str, Any], precompute: bool
) -> None:
    @kvpref.loss(needs_reference=True, temperature=0.7)
    def loss(policy: Any, reference: Any, batch: kvpref.Batch) -> kvpref.LossOutput:
        margins.append((policy.token_logps - reference.token_logps).detach().abs().max().item())
        return kvpref.LossOutput(loss=(policy.sum() - reference.sum()).mean(), metrics={})

    margins: list[float] = []
    trainer = make_trainer(tmp_path, loss=loss, precompute_reference=precompute, max_steps=1, **engine)
    trainer.train()
    assert margins
    assert max(margins) < TOLERANCE
    expected = token_logps(make_model(), head=kvpref.HeadOptions(temperature=0.7))
    assert relative_error(reference_logps(trainer), expected) < TOLERANCE
    assert relative_error(expected, token_logps(make_model())) > 1e-2


def test_stored_log_probs_of_another_temperature_are_refused(tmp_path: Path) -> None:
    make_trainer(tmp_path).train()

    @kvpref.loss(needs_reference=True, temperature=0.7)
    def loss(policy: Any, reference: Any, batch: kvpref.Batch) -> kvpref.LossOutput:
        raise AssertionError("must not be reached")

    with pytest.raises(kvpref.InputError, match="another temperature"):
        make_trainer(tmp_path, loss=loss).train()


def test_a_reference_on_another_device_than_the_batch(tmp_path: Path) -> None:
    """The batch comes from where it was collated: a meta tensor has nothing to copy back."""
    trainer = make_trainer(tmp_path, precompute_reference=False)
    trainer.references.prepare("train", trainer.train_dataset)
    step = next(iter(trainer._make_loader(trainer.train_dataset, 100, shuffle=False)))
    item = next(iter(step))
    found = trainer.references.for_batch("train", item, item.batch.to("meta"))
    assert {tensor.device.type for tensor in found if tensor is not None} == {"meta"}
    assert found.token_logps.shape == (item.batch.num_scored_tokens,)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("settings", [{}, {"reference_sync_steps": 1, "reference_sync_alpha": 1.0}], ids=["", "synced"])
def test_a_reference_in_host_memory(tmp_path: Path, settings: dict[str, Any]) -> None:
    trainer = make_trainer(
        tmp_path, use_cpu=False, precompute_reference=False, reference_device="cpu", max_steps=1, **settings
    )
    trainer.train()
    assert first_loss(trainer) == pytest.approx(LOG_TWO, abs=1e-7)
    assert {item.device.type for item in trainer.model.parameters()} == {"cuda"}
    assert {item.device.type for item in trainer.references._reference().model_of().parameters()} == {"cpu"}
    expected = trainer.model.cpu() if settings else make_model()
    assert relative_error(reference_logps(trainer), token_logps(expected)) < TOLERANCE


@pytest.mark.full
def test_evaluating_on_another_dataset(tmp_path: Path) -> None:
    groups = make_groups(5, seed=3)
    found = {}
    for name, settings in (
        ("copy", {"precompute_reference": False}),
        ("second, precomputed", {"reference_model": make_model()}),
    ):
        trainer = make_trainer(tmp_path / name, **settings)
        trainer.train()
        found[name] = trainer.evaluate(groups)["eval_loss"]
    known = kvpref.PreferenceTrainer(
        make_model(), make_args(str(tmp_path / "known")), train_dataset=make_groups(), eval_dataset=groups
    )
    known.train()
    expected = known.evaluate()["eval_loss"]
    assert expected != pytest.approx(LOG_TWO, abs=1e-4)
    assert all(value == pytest.approx(expected, rel=1e-9) for value in found.values()), found


def test_evaluating_against_a_reference_that_is_gone_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    groups = make_groups(5, seed=3)
    assert trainer.evaluate(groups)["eval_loss"] == pytest.approx(LOG_TWO, abs=1e-9)  # not yet trained
    trainer.train()
    with pytest.raises(kvpref.InputError, match="precompute_reference=False"):
        trainer.evaluate(groups)
    trainer.eval_dataset = groups
    with pytest.raises(kvpref.InputError, match="precompute_reference=False"):
        trainer.evaluate()


def test_a_copy_of_the_policy_as_reference(tmp_path: Path) -> None:
    model = make_model()
    trainer = make_trainer(tmp_path, model, reference_model=copy.deepcopy(model), precompute_reference=False)
    trainer.train()
    assert relative_error(reference_logps(trainer), token_logps(make_model())) < TOLERANCE
