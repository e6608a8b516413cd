"""What commands say of the data, and texts that are longer than the model's positions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line_in_process import fail, run
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

ROWS = [
    {"question": "one two", "chosen": " three", "rejected": " four", "source": "a"},
    {"question": "two three", "chosen": " four", "rejected": " five", "source": "b"},
]
WORDS = ("one", "two", "three")
NOTICES = (
    "`question` is taken as the prompt, since there is no `prompt` (2 rows)",
    "columns that nothing reads, at least in some rows: `source`",
)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> dict[str, Path]:
    """By family, a model of 16 positions and its tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"vocab_size": 16, "bos_token_id": 0, "eos_token_id": 0}
    built = {
        "gpt2": GPT2LMHeadModel(GPT2Config(n_positions=16, n_embd=8, n_layer=1, n_head=1, **sizes)),
        "llama": LlamaForCausalLM(
            LlamaConfig(
                max_position_embeddings=16,
                hidden_size=8,
                intermediate_size=8,
                num_hidden_layers=1,
                num_attention_heads=1,
                **sizes,
            )
        ),
    }
    for name, model in built.items():
        model.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(folder / name)
    return {name: folder / name for name in built}


def test_train_score_and_inspect_say_what_was_done_with_the_columns(
    models: dict[str, Path], tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "rows.jsonl", ROWS)
    for arguments in (
        ("train", models["llama"], data, "--output", tmp_path / "out", "--set", "max_steps=1", "--set", "use_cpu=true"),
        ("score", models["llama"], data, "--output", tmp_path / "scores.jsonl"),
        ("data", "inspect", data, "--tokenizer", tokenizer_dir),
    ):
        run(*arguments)
        said = capsys.readouterr()
        for notice in NOTICES:
            assert (said.out + said.err).count(notice) == 1, arguments


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_score_refuses_what_is_longer_than_the_models_positions(
    family: str, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {
        "prompt": "one two three four five six seven eight nine ten",
        "chosen": " one two three four five six",
        "rejected": " one",
    }
    data = write(tmp_path / "rows.jsonl", [*ROWS, long])
    output = tmp_path / "scores.jsonl"
    error = fail(capsys, "score", models[family], data, "--output", output)
    assert "rows.jsonl:3: a sequence of 17 tokens is longer than the model's 16 positions" in error
    assert not output.exists()
    run("score", models[family], data, "--output", output, "--max-response-tokens", "5")
    assert len(output.read_text().splitlines()) == 6


REFUSED = {
    "ranks": (
        [{"prompt": f"{WORDS[n]}:", "responses": [" one", " two"], "ranks": [1, 2]} for n in range(3)],
        "kto",
        "rows.jsonl:1: kto reads how good each response is by itself, and ranks say only which one is better",
    ),
    "no prompt": (
        [*ROWS, {"chosen": "one three", "rejected": "two"}],
        "dpo",
        "rows.jsonl:3: `chosen` and `rejected` have no common beginning, so there is no prompt",
    ),
    "images": (
        [{**ROWS[0], "images": ["a.png"]}],
        "dpo",
        "rows.jsonl:1: the row has images, and a tokenizer alone reads none",
    ),
}


@pytest.mark.parametrize("kind", list(REFUSED))
def test_train_refuses_what_would_be_lost(
    kind: str, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, loss, message = REFUSED[kind]
    data = write(tmp_path / "rows.jsonl", rows)
    error = fail(capsys, "train", models["llama"], data, "--output", tmp_path / "out", "--loss", loss)
    assert message in error
    assert not (tmp_path / "out" / "model.safetensors").exists()
