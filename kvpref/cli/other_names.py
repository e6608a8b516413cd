"""What transformers, TRL and other tools call settings of `kvpref train`."""

from __future__ import annotations

SHORT_OPTIONS = {
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "max_tokens": "max_tokens_per_micro_batch",
}
"""Settings whose option has a name of its own, by that name."""

SAME = {
    **SHORT_OPTIONS,
    "model_name_or_path": "model",
    "dataset_name": "data",
    "output_dir": "output",
    "torch_dtype": "dtype",
}
"""Names that mean exactly what a setting means, and that setting."""

INSTEAD = {
    "adapter": ("lora_r", "an adapter's folder is given as the model"),
    "attn_implementation": ("backend", "`kvpref doctor` lists those that work here"),
    "base_model": ("model", ""),
    "cutoff_len": ("max_prompt_tokens", "responses have max_response_tokens"),
    "dataset": ("data", ""),
    "datasets": ("data", "it takes a list of files and names"),
    "dataset_test_split": ("eval_data", ""),
    "dataset_train_split": ("split", ""),
    "eval_dataset": ("eval_data", ""),
    "evaluation_strategy": ("eval_strategy", ""),
    "flash_attn": ("backend", "`kvpref doctor` lists those that work here"),
    "lora_rank": ("lora_r", ""),
    "lora_target": ("lora_target_modules", ""),
    "loss_type": ("loss", "`kvpref losses` lists them; TRL's sigmoid is dpo"),
    "lr": ("learning_rate", ""),
    "lr_scheduler": ("lr_scheduler_type", ""),
    "max_completion_length": ("max_response_tokens", ""),
    "max_length": ("max_prompt_tokens", "responses have max_response_tokens"),
    "max_prompt_length": ("max_prompt_tokens", ""),
    "max_seq_length": ("max_prompt_tokens", "responses have max_response_tokens"),
    "micro_batch_size": ("per_device_train_batch_size", "it counts prompts"),
    "num_epochs": ("num_train_epochs", ""),
    "optimizer": ("optim", ""),
    "overwrite_output_dir": ("overwrite", "it is given on the command line only"),
    "precompute_ref_log_probs": ("precompute_reference", "it is on unless switched off"),
    "pref_loss": ("loss", "`kvpref losses` lists them; sigmoid is dpo"),
    "ref_model": ("reference_model", ""),
    "ref_model_mixup_alpha": ("reference_sync_alpha", ""),
    "ref_model_sync_steps": ("reference_sync_steps", ""),
    "rl": ("loss", "`kvpref losses` lists them"),
    "scheduler": ("lr_scheduler_type", ""),
    "sequence_len": ("max_prompt_tokens", "responses have max_response_tokens"),
    "sync_ref_model": ("reference_sync_steps", ""),
    "use_peft": ("lora_r", "a rank trains an adapter"),
    "val_size": ("eval_data", "it names other data"),
    "warmup_ratio": ("warmup_steps", "below 1 it is a share of all steps, such as warmup_steps=0.1"),
}
"""Names from elsewhere that are no settings here: what to give instead, and what to know about it."""

WITHOUT_EFFECT = {
    "resume_from_checkpoint": "give --resume",
    "label_smoothing_factor": "losses on pairs have --loss-arg label_smoothing",
}
"""Arguments of transformers that have no effect here, and what to use."""


def setting_name(name: str) -> str:
    """The setting that a name stands for, hyphens as underscores."""
    name = name.replace("-", "_")
    return SAME.get(name, name)
