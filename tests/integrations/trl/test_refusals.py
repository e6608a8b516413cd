"""Every option that cannot work is refused by its name, before a model is loaded or data is read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

trl = pytest.importorskip("trl", reason="needs the extra kvpref[trl]")
peft = pytest.importorskip("peft", reason="needs the extra kvpref[peft]")

import trl_runs  # noqa: E402
from accelerate import ParallelismConfig  # noqa: E402
from tiny_experts import tiny_experts  # noqa: E402
from tiny_models import build_model, tiny_config, tiny_model  # noqa: E402
from transformers import (  # noqa: E402
    BloomConfig,
    HunYuanDenseV1Config,
    HunYuanDenseV1ForCausalLM,
    LlamaForCausalLM,
    MllamaConfig,
    ProcessorMixin,
)
from trl.experimental.async_grpo import AsyncGRPOConfig  # noqa: E402

from kvpref import InputError  # noqa: E402
from kvpref.integrations import trl as kvpref_trl  # noqa: E402
from kvpref.integrations.trl.replacements import without_replaced  # noqa: E402
from kvpref.integrations.trl.setup import Setup  # noqa: E402

TRAINERS = {
    "AsyncGRPOTrainer": AsyncGRPOConfig,
    "DPOTrainer": trl.DPOConfig,
    "GRPOTrainer": trl.GRPOConfig,
    "KTOTrainer": trl.KTOConfig,
    "RewardTrainer": trl.RewardConfig,
}


class Case:
    """What to ask for: `options` set on the config, `arguments` of the trainer, and the model."""

    def __init__(
        self,
        refusal: str,
        model: Callable[[], Any] | None = None,
        arguments: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.refusal, self.model, self.arguments, self.options = refusal, model, arguments or {}, options


class CustomForCausalLM(LlamaForCausalLM):
    """As code that comes with a checkpoint defines it."""


class Customised:
    @staticmethod
    def from_config(config: Any, **kwargs: Any) -> LlamaForCausalLM:
        return CustomForCausalLM(config)


class Processor(ProcessorMixin):
    def __init__(self) -> None: ...


def split_model() -> Any:
    model = tiny_model("llama")
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": "cpu"}
    return model


def hunyuan() -> Any:
    """Its norms behind the rotation tell positions apart, not distances alone."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return HunYuanDenseV1ForCausalLM(
        HunYuanDenseV1Config(**sizes, num_key_value_heads=2, head_dim=16, vocab_size=32, pad_token_id=0)
    )


def mixtral() -> Any:
    return tiny_experts("mixtral", router_aux_loss_coef=0.01)


def prompt_tuned() -> Any:
    return peft.get_peft_model(tiny_model("llama"), PROMPT_TUNING)


PROMPT_TUNING = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
LORA = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}

COUNTS_PADDING = "models to which padding before a prompt counts (gpt2, llama4 and others)"

CASES = (
    Case(
        "gradient_checkpointing_kwargs={'use_reentrant': True}",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": True},
    ),
    Case("torch_compile=True", torch_compile=True),
    Case("model_init_kwargs={'use_kernels': True}", model_init_kwargs={"use_kernels": True}),
    Case("activation_offloading=True", activation_offloading=True),
    Case("neftune_noise_alpha", neftune_noise_alpha=5.0),
    Case(
        "parallelism_config with context, sequence or tensor parallelism",
        parallelism_config=ParallelismConfig(tp_size=2),
    ),
    Case(
        "parallelism_config with context, sequence or tensor parallelism",
        parallelism_config=ParallelismConfig(cp_size=2),
    ),
    Case("the first version of FSDP", fsdp=True, fsdp_config={"version": 1}),
    Case("FSDP's cpu_offload", fsdp_plugin_args={"fsdp_version": 2, "cpu_offload": True}),
    Case("a model without weights (on the meta device)", model=lambda: tiny_model("llama").to("meta")),
    Case("a model split over several devices (device_map)", model=split_model),
    Case("vision-language models as reward models", arguments={"processing_class": Processor()}),
    Case("vision-language models of this family", arguments={"processing_class": Processor()}),
    Case("vision-language models in rows without images", arguments={"processing_class": Processor()}),
    Case("router_aux_loss_coef above 0", model=mixtral),
    Case("router_aux_loss_coef above 0", model=lambda: tiny_experts("mixtral"), router_aux_loss_coef=0.1),
    Case("PEFT prompt learning (prompt, prefix or p-tuning)", arguments={"peft_config": PROMPT_TUNING}),
    Case("PEFT prompt learning (prompt, prefix or p-tuning)", model=prompt_tuned),
    Case(
        "activated LoRA (alora_invocation_tokens)",
        arguments={"peft_config": peft.LoraConfig(**LORA, alora_invocation_tokens=[5])},
    ),
    Case("dropout in training", model=lambda: tiny_model("llama", attention_dropout=0.1)),
    Case(
        "lora_dropout",
        arguments={"peft_config": peft.LoraConfig(**LORA, lora_dropout=0.1)},
        disable_dropout=False,
    ),
    Case("custom code (trust_remote_code)", model=lambda: build_model(tiny_config("llama"), auto_class=Customised)),
    Case("dropout in training", model=lambda: tiny_model("gpt_neox", hidden_dropout=0.1), disable_dropout=False),
    Case("cast_lm_head_to_fp32=True", cast_lm_head_to_fp32=True),
    Case("use_transformers_continuous_batching=True", use_transformers_continuous_batching=True),
    Case("use_transformers_continuous_batching=True", use_transformers_paged=True),
    Case(COUNTS_PADDING, model=lambda: tiny_model("gpt2")),
    Case(COUNTS_PADDING, model=hunyuan),
)
ROWS = {refusal.name: refusal for refusal in kvpref_trl.REFUSALS}
RUNS = [(trainer, case) for case in CASES for trainer in TRAINERS if trainer in ROWS[case.refusal].trainers]


@pytest.fixture
def path_without_weights(tmp_path: Path) -> str:
    tiny_config("llama").save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def build(trainer: str, case: Case, path: str, output: Path) -> Any:
    # Set one by one: constructing the config with them would ask for packages and devices.
    args = TRAINERS[trainer](output_dir=str(output), use_cpu=True, bf16=False, report_to="none")
    for name, value in case.options.items():
        setattr(args, name, value)
    extra = {"reward_funcs": len} if trainer.endswith("GRPOTrainer") else {}
    model = path if case.model is None else case.model()
    return getattr(kvpref_trl, trainer)(model=model, args=args, **extra, **case.arguments)


@pytest.mark.parametrize(("trainer", "case"), RUNS, ids=[f"{trainer}-{case.refusal}" for trainer, case in RUNS])
def test_refused_by_name(trainer: str, case: Case, path_without_weights: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as found:
        build(trainer, case, path_without_weights, tmp_path)
    assert str(found.value) == f"kvpref's {trainer} does not support {case.refusal}: {ROWS[case.refusal].reason}"


def test_every_row_is_tested() -> None:
    assert {case.refusal for case in CASES} == set(ROWS)


def test_first_fsdp_by_accelerates_launcher(
    path_without_weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(InputError, match="does not support the first version of FSDP"):
        build("DPOTrainer", Case("the first version of FSDP"), path_without_weights, tmp_path)


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("config", [BloomConfig(), MllamaConfig()], ids=["own attention", "images"])
def test_families_are_refused_by_configuration(trainer: str, config: Any, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path / "model")
    reason = "attention interface" if config.model_type == "bloom" else "vision-language"
    with pytest.raises(InputError, match=reason):
        build(trainer, Case("none"), str(tmp_path / "model"), tmp_path)


@pytest.mark.parametrize("settings", [{"model_type": "mine"}, {"trust_remote_code": True}, {"by_loading": True}])
def test_custom_code_of_a_checkpoint_is_refused_before_it_runs(settings: dict[str, Any], tmp_path: Path) -> None:
    """Of an architecture that transformers lacks, or trusted to stand in for one that it has."""
    path = tmp_path / "model"
    tiny_config("mistral").save_pretrained(path)
    described = json.loads((path / "config.json").read_text())
    described["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    described["model_type"] = settings.get("model_type", described["model_type"])
    (path / "config.json").write_text(json.dumps(described))
    (path / "own.py").write_text("raise RuntimeError('this code ran')\n")
    options = {"model_init_kwargs": {"trust_remote_code": True}} if "by_loading" in settings else {}
    trusted = {"trust_remote_code": True} if "trust_remote_code" in settings else {}
    with pytest.raises(InputError, match=r"does not support custom code \(trust_remote_code\)"):
        build("DPOTrainer", Case("custom", **options, **trusted), str(path), tmp_path)


def test_untrusted_code_does_not_matter(tmp_path: Path) -> None:
    """transformers has the architecture and runs its own."""
    tiny_config("llama", attention_dropout=0.1).save_pretrained(tmp_path / "model")
    described = json.loads((tmp_path / "model" / "config.json").read_text())
    described["auto_map"] = {"AutoModelForCausalLM": "own.OwnForCausalLM"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(described))
    with pytest.raises(InputError, match="does not support dropout in training"):
        build("DPOTrainer", Case("dropout"), str(tmp_path / "model"), tmp_path)


def test_grpo_with_lora_dropout_names_the_fix_first(path_without_weights: str, tmp_path: Path) -> None:
    """GRPO leaves dropout on unless told, unlike the others."""
    case = Case("lora_dropout", arguments={"peft_config": peft.LoraConfig(**LORA, lora_dropout=0.05)})
    with pytest.raises(InputError, match="does not support lora_dropout: set lora_dropout=0 in the LoraConfig"):
        build("GRPOTrainer", case, path_without_weights, tmp_path)
    with pytest.raises(InputError, match="does not support lora_dropout"):
        kvpref_trl.GRPOTrainer(model=path_without_weights, reward_funcs=len, **case.arguments)


KERNELS = {"use_liger_kernel": True, "model_init_kwargs": {"attn_implementation": "flash_attention_2", "revision": "a"}}
LOADING = {"fsdp_version": 2, "cpu_ram_efficient_loading": True}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_options_are_replaced_with_a_warning(
    trainer: str, path_without_weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    args = TRAINERS[trainer](output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    for name, value in KERNELS.items():
        setattr(args, name, value)
    args.fsdp_plugin_args = LOADING
    setup = Setup.from_arguments(trainer, {"model": path_without_weights, "args": args})
    with pytest.warns(UserWarning, match="does not use") as caught:
        found = without_replaced(setup)
    assert [str(item.message) for item in caught] == [
        f"kvpref's {trainer} does not use {item.name}: {item.runs}" for item in kvpref_trl.REPLACEMENTS
    ]
    assert (found.use_liger_kernel, found.model_init_kwargs) == (False, {"revision": "a"})
    assert (args.use_liger_kernel, args.model_init_kwargs) == tuple(KERNELS.values())  # the user's own
    assert (found.fsdp_plugin_args["cpu_ram_efficient_loading"], args.fsdp_plugin_args) == (False, LOADING)
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"


def test_loading_on_one_rank_by_accelerates_launcher(
    path_without_weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("ACCELERATE_USE_FSDP", "true"), ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")):
        monkeypatch.setenv(name, value)
    with pytest.warns(UserWarning, match="cpu_ram_efficient_loading"):
        assert without_replaced(Setup.from_arguments("DPOTrainer", {"model": path_without_weights})) is None
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"


@pytest.mark.parametrize("options", [{}, {"model_init_kwargs": {"attn_implementation": "sdpa"}}])
def test_asking_for_what_runs_anyway_is_no_reason_to_warn(
    options: dict[str, Any], path_without_weights: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    args = trl.DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **options)
    assert without_replaced(Setup.from_arguments("DPOTrainer", {"model": path_without_weights, "args": args})) is args
    assert not [item for item in recwarn if "does not use" in str(item.message)]


def test_a_trainer_with_replaced_kernels_trains(tmp_path: Path) -> None:
    """Without the packages that were asked for."""
    path = trl_runs.save_model(tmp_path / "model")
    args = trl_runs.make_args(trl.DPOConfig, tmp_path, max_steps=1)
    args.use_liger_kernel, args.model_init_kwargs = True, {"attn_implementation": "flash_attention_2"}
    with pytest.warns(UserWarning, match="does not use"):
        trainer = kvpref_trl.DPOTrainer(path, args=args, train_dataset=trl_runs.pairs())
    trainer.train()
    assert trainer.model.config._attn_implementation == "kvpref"


@pytest.mark.parametrize("trainer", TRAINERS)
def test_unknown_mode(trainer: str, path_without_weights: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="two_pass"):
        build(trainer, Case("none", arguments={"mode": "three_pass"}), path_without_weights, tmp_path)
