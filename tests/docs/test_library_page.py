"""docs/library.md gives what it says: its code runs, and its numbers are those of the model alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from markdown_pages import DOCS, code_blocks
from transformers import LlamaConfig, LlamaForCausalLM

import kvpref

VOCAB_SIZE = 32


@pytest.fixture
def blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The page's Python, in a folder that holds the model it loads."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained("my-model")
    found = code_blocks(DOCS / "library.md", "python")
    assert len(found) == 3
    return found


def test_log_probs_over_shared_prompts(blocks: list[str]) -> None:
    names: dict[str, Any] = {}
    exec(blocks[0], names)
    padded = names["logps"].token_logps
    batch, model, cache = names["batch"], names["model"], names["cache"]
    assert batch.num_unique_tokens == 4 + 2 + 1 + 3
    assert cache.layers[0].get_seq_length() == 4
    # float32, two ways to one sum
    assert (kvpref.score_responses(model, batch, cache).token_logps - padded).abs().max() < 1e-5
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_shared_prefix_serves_its_example(blocks: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(blocks[2], names)
    printed = capsys.readouterr().out.strip()
    assert f"print(shared.stats)  # {printed}\n" in blocks[2]

    model, input_ids, served = names["model"], names["input_ids"], names["outputs"]
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    alone = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), labels=input_ids)
    alone.loss.backward()
    # float32, sums in another order
    torch.testing.assert_close(served.logits, alone.logits, rtol=0, atol=1e-5)
    for grad, parameter in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=0, atol=1e-5)
