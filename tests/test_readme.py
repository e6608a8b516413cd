"""README's Python runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvpref

README = Path(__file__).resolve().parents[1] / "README.md"


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library, loss = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained("my-model")

    names: dict[str, Any] = {}
    exec(library, names)
    padded = names["logps"].token_logps
    batch, model, cache = names["batch"], names["model"], names["cache"]
    assert batch.num_unique_tokens == 4 + 2 + 1 + 3
    assert cache.layers[0].get_seq_length() == 4
    # float32, two ways to one sum
    assert (kvpref.score_responses(model, batch, cache).token_logps - padded).abs().max() < 1e-5
    assert all(parameter.grad is not None for parameter in model.parameters())

    sequence = kvpref.Sequence.from_prompt_and_response
    prompt = list(range(1, 20))
    names["groups"] = [kvpref.Group([sequence(prompt, [20]), sequence(prompt, [21, 22])]) for _ in range(4)]
    exec(loss, names)
    names["args"].max_steps, names["args"].report_to = 1, []
    names["trainer"].train()
    assert names["trainer"].state.global_step == 1


def test_results_are_those_that_were_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(README.parent / "benchmarks"))
    import readme_table

    lines = readme_table.table(README.parent / "benchmarks" / "results")
    assert len(lines) > 20
    assert "\n".join(lines) in README.read_text()


def test_peaks_are_those_that_were_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(README.parent / "benchmarks"))
    import memory_readme

    lines = memory_readme.table(README.parent / "benchmarks" / "results")
    assert len(lines) == 2 + 4
    assert "\n".join(lines) in README.read_text()
