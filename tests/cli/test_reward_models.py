"""Reward models from the command line: trained, saved for transformers, scored, and not taken for something else."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from command_line_in_process import fail, run
from safetensors import safe_open
from tiny_models import tiny_config
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

import kvpref
from kvpref.cli.padding import set_pad_token
from kvpref.data import PreferenceDataset

STEPS = [
    *("--max-steps", 12, "--batch-size", 8, "--learning-rate", 1e-2, "--set", "use_cpu=true"),
    *("--set", "warmup_steps=0", "--set", "lr_scheduler_type=linear"),  # few steps: none to lose
]
# float32; padded rows and shared prefixes add up in different orders
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def reward_dir(tmp_path_factory: pytest.TempPathFactory, trained_dir: Path, pairs_file: Path) -> Path:
    output = tmp_path_factory.mktemp("reward") / "model"
    run("train", trained_dir, pairs_file, "--output", output, "--loss", "bradley_terry", *STEPS)
    return output


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rewards_by_transformers(folder: Path, data: Path) -> list[float]:
    """The rewards of chosen and rejected responses in one padded batch, through transformers alone."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows = [row["prompt"] + row[name] for row in read(data) for name in ("chosen", "rejected")]
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in rows]
    padded = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
    with torch.no_grad():
        return model(**padded).logits.squeeze(-1).tolist()


def test_rewards_are_those_of_transformers_on_padded_rows(reward_dir: Path, pairs_file: Path, tmp_path: Path) -> None:
    data = tmp_path / "uneven.jsonl"
    rows = [row | {"rejected": row["rejected"] + " four" * index} for index, row in enumerate(read(pairs_file)[:5])]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("score", reward_dir, data, "--reward-model", "--output", tmp_path / "rewards.jsonl")
    scored = read(tmp_path / "rewards.jsonl")
    assert [(row["id"], row["response"]) for row in scored] == [
        (f"{data}:{line}", response) for line in range(1, 6) for response in (0, 1)
    ]
    expected = rewards_by_transformers(reward_dir, data)
    assert [row["reward"] for row in scored] == pytest.approx(expected, abs=TOLERANCE)


def test_scores_beside_rewards_and_how_well_they_agree(
    reward_dir: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = [
        {"prompt": row["prompt"], "responses": [row["rejected"], row["chosen"], " five"], "scores": [0.25, 1.0, None]}
        for row in read(pairs_file)
    ]
    data = tmp_path / "groups.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in groups))
    capsys.readouterr()
    run("score", reward_dir, data, "--reward-model", "--output", tmp_path / "rewards.parquet", "--json")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = pyarrow.parquet.read_table(tmp_path / "rewards.parquet").to_pylist()
    assert [row["score"] for row in rows[:3]] == [0.25, 1.0, None]
    right = sum(rows[start + 1]["reward"] > rows[start]["reward"] for start in range(0, len(rows), 3))
    assert found["num_pairs"] == len(groups)
    assert found["pair_accuracy"] == pytest.approx(right / len(groups))
    assert found["best_of_n_score"] == pytest.approx((right + 0.25 * (len(groups) - right)) / len(groups))
    assert (found["mean_score"], found["oracle_score"]) == (0.625, 1.0)
    # " N two" is always chosen, " N three" never: twelve steps learn that.
    assert found["pair_accuracy"] > 0.9


def test_data_without_scores_gives_rewards_alone(reward_dir: Path, tmp_path: Path) -> None:
    data = tmp_path / "unscored.jsonl"
    data.write_text(json.dumps({"prompt": "one two", "responses": [" three", " four"]}) + "\n")
    run("score", reward_dir, data, "--reward-model", "--output", tmp_path / "rewards.jsonl")
    assert [set(row) for row in read(tmp_path / "rewards.jsonl")] == [{"group", "id", "response", "reward"}] * 2


def test_a_pad_token_of_its_own_is_saved(reward_dir: Path) -> None:
    config = json.loads((reward_dir / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(reward_dir)
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["pad_token_id"] == tokenizer.pad_token_id == 12
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_embeddings_grow_where_the_pad_token_finds_no_row(
    config_file: Path, tokenizer_dir: Path, pairs_file: Path, tmp_path: Path
) -> None:
    full = tmp_path / "full.json"
    full.write_text(json.dumps(json.loads(config_file.read_text()) | {"vocab_size": 12}))
    output = tmp_path / "out"
    start = ["--model-config", full, pairs_file, "--tokenizer", tokenizer_dir, "--loss", "bradley_terry"]
    run("train", *start, "--output", output, *STEPS[2:], "--max-steps", 1)
    model = AutoModelForSequenceClassification.from_pretrained(output)
    assert model.get_input_embeddings().weight.shape[0] == 13
    run("score", output, pairs_file, "--reward-model", "--output", tmp_path / "rewards.jsonl")
    found = [row["reward"] for row in read(tmp_path / "rewards.jsonl")]
    assert found == pytest.approx(rewards_by_transformers(output, pairs_file), abs=TOLERANCE)


def test_a_reward_adapter(trained_dir: Path, pairs_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="needs the extra kvpref[peft]")
    output = tmp_path / "adapter"
    run("train", trained_dir, pairs_file, "--output", output, "--loss", "bradley_terry", "--lora-r", 4, *STEPS)
    run("score", output, pairs_file, "--reward-model", "--output", tmp_path / "rewards.jsonl")
    rewards = [row["reward"] for row in read(tmp_path / "rewards.jsonl")]
    right = sum(chosen > rejected for chosen, rejected in zip(rewards[::2], rewards[1::2], strict=True))
    # The head, which began at random, must be the one that was trained.
    assert right > 0.9 * len(rewards) / 2


@pytest.mark.parametrize("num_rows", [12, 16], ids=["no spare row", "spare rows"])
def test_a_reward_adapter_fits_its_base_and_pads(
    trained_dir: Path, pairs_file: Path, tmp_path: Path, num_rows: int
) -> None:
    """With peft and transformers alone: the adapter holds no embeddings, and padded batches give the same rewards."""
    peft = pytest.importorskip("peft", reason="needs the extra kvpref[peft]")
    base, output = tmp_path / "base", tmp_path / "adapter"
    plain = AutoModelForCausalLM.from_pretrained(trained_dir)
    plain.resize_token_embeddings(num_rows)
    plain.save_pretrained(base)
    AutoTokenizer.from_pretrained(trained_dir).save_pretrained(base)
    data = tmp_path / "uneven.jsonl"
    rows = [row | {"rejected": row["rejected"] + " four" * index} for index, row in enumerate(read(pairs_file)[:8])]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("train", base, data, "--output", output, "--loss", "bradley_terry", "--lora-r", 2, *STEPS)
    with safe_open(output / "adapter_model.safetensors", framework="pt") as file:
        assert all("lora_" in name or name.endswith("score.weight") for name in file.keys())  # noqa: SIM118
    assert (output / "adapter_model.safetensors").stat().st_size < (base / "model.safetensors").stat().st_size

    run("score", output, data, "--reward-model", "--output", tmp_path / "rewards.jsonl", "--dtype", "float32")
    head = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype="float32")
    model, tokenizer = peft.PeftModel.from_pretrained(head, output).eval(), AutoTokenizer.from_pretrained(output)
    model.config.pad_token_id = tokenizer.pad_token_id
    assert tokenizer.pad_token_id == (1 if num_rows == 12 else 12)  # <unk>, which the data lacks; a spare row
    texts = [row["prompt"] + row[name] for row in rows for name in ("chosen", "rejected")]
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([row])).logits.item() for row in ids]
        padded = model(**tokenizer.pad({"input_ids": ids}, return_tensors="pt")).logits.squeeze(-1).tolist()
    assert len(set(map(len, ids))) > 1
    scored = [row["reward"] for row in read(tmp_path / "rewards.jsonl")]
    assert scored == pytest.approx(alone, abs=1e-5)
    assert scored == pytest.approx(padded, abs=1e-5)

    run("train", output, data, "--output", tmp_path / "more", "--loss", "bradley_terry", *STEPS[2:], "--max-steps", 1)
    assert AutoTokenizer.from_pretrained(tmp_path / "more").pad_token_id == tokenizer.pad_token_id


@pytest.fixture
def words() -> PreTrainedTokenizerFast:
    """Tokens 0 to 5; 0 ends texts."""
    core = Tokenizer(models.WordLevel({name: index for index, name in enumerate(["<eos>", "<unk>", *"abcd"])}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>", pad_token="<eos>")


@pytest.mark.parametrize(
    ("used", "expected"),
    [([2, 3], 1), ([1, 2, 3], 5), ([1, 2, 3, 5], 4), ([1, 2, 3, 4, 5], None)],
    ids=["unknown token", "last of the vocabulary", "the last unused", "none left"],
)
def test_an_adapters_pad_token_is_one_that_the_data_lacks(
    words: PreTrainedTokenizerFast, used: list[int], expected: int | None
) -> None:
    peft = pytest.importorskip("peft", reason="needs the extra kvpref[peft]")
    base = LlamaForSequenceClassification(tiny_config("llama", vocab_size=6, num_labels=1, eos_token_id=0))
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"]))
    group = kvpref.Group([kvpref.Sequence.from_prompt_and_response([2], used)] * 2)
    lines: list[str] = []
    set_pad_token(model, words, [PreferenceDataset([group])], lines.append)
    assert words.pad_token_id == model.config.pad_token_id == expected
    assert len(words) == model.get_input_embeddings().weight.shape[0] == 6
    assert len(lines) == 1


def test_a_reserved_token_pads_and_adds_no_row(words: PreTrainedTokenizerFast) -> None:
    words.add_special_tokens({"additional_special_tokens": ["<|reserved_0|>", "<|reserved_1|>", "<|end|>"]})
    model = LlamaForSequenceClassification(tiny_config("llama", vocab_size=9, num_labels=1, eos_token_id=0))
    group = kvpref.Group([kvpref.Sequence.from_prompt_and_response([2], [7])] * 2)
    set_pad_token(model, words, [PreferenceDataset([group])])
    assert words.pad_token == "<|reserved_0|>"
    assert len(words) == 9


def test_a_model_of_the_other_kind_is_refused(
    reward_dir: Path, trained_dir: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["--output", tmp_path / "out.jsonl"]
    error = fail(capsys, "score", trained_dir, pairs_file, "--reward-model", *output)
    assert "lack 'score.weight', which would be random; it is no reward model" in error
    assert "holds a reward model" in fail(capsys, "score", reward_dir, pairs_file, *output)
    error = fail(capsys, "train", reward_dir, pairs_file, "--output", tmp_path / "out", "--loss", "dpo", *STEPS)
    assert "holds a reward model, whose log-probs mean nothing" in error
