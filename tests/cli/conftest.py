"""A tiny model, tokenizer and data set on disk for command-line tests."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from command_line import Run, command_line, environment
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
CONFIG = {
    "model_type": "llama",
    "vocab_size": 16,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    vocab = {word: index for index, word in enumerate(["<eos>", "<unk>", *WORDS])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", bos_token="<eos>", unk_token="<unk>", pad_token="<eos>"
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.json"
    path.write_text(json.dumps(CONFIG))
    return path


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = []
    for index in range(24):
        prompt = " ".join(WORDS[(index + step) % 10] for step in range(18))
        rows.append(
            {"prompt": prompt, "chosen": f" {WORDS[index % 10]} two", "rejected": f" {WORDS[(index + 1) % 10]} three"}
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def kvpref_command() -> Run:
    """Run `kvpref ARGUMENTS...` in a fresh process."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command_line(*arguments), capture_output=True, text=True, timeout=1200, env=environment(), check=False
        )

    return run


@pytest.fixture(scope="session")
def trained_dir(
    tmp_path_factory: pytest.TempPathFactory,
    kvpref_command: Run,
    tokenizer_dir: Path,
    config_file: Path,
    pairs_file: Path,
) -> Path:
    """A model trained for a few sft steps, with its tokenizer beside it."""
    output = tmp_path_factory.mktemp("trained") / "model"
    done = kvpref_command(
        *("train", "--model-config", config_file, pairs_file, "--tokenizer", tokenizer_dir, "--output", output),
        *("--loss", "sft", "--max-steps", 3, "--learning-rate", 1e-2, "--set", "use_cpu=true"),
    )
    assert done.returncode == 0, done.stderr
    return output
