"""A tiny task from made-up token lists, so that everything runs in seconds without data."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from peers.task import Task, make_task

NUM_WORDS = 96
END = "</s>"
MODEL_SETTINGS: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": NUM_WORDS + 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "eos_token_id": NUM_WORDS,
    "bos_token_id": None,
}


def made_up_task(
    work_dir: Path,
    *,
    num_pairs: int = 24,
    seed: int = 0,
    longer: int = 1,
    model_settings: dict[str, Any] | None = None,
    device: str = "cpu",
) -> Task:
    """Pairs of random words, for a model of two layers unless another is given.

    Args:
        work_dir: Where files go.
        num_pairs: How many.
        seed: Of the words.
        longer: Factor on the lengths: prompts of 20 to 40 tokens and responses of 3 to 12.
        model_settings: As in `Task`.
        device: Where everything runs.
    """
    generator = random.Random(seed)

    def words(fewest: int, most: int) -> str:
        return "".join(
            f" w{generator.randrange(NUM_WORDS)}" for _ in range(generator.randint(fewest * longer, most * longer))
        )

    rows = [{"prompt": words(20, 40), "chosen": words(3, 12), "rejected": words(3, 12)} for _ in range(num_pairs)]
    data = work_dir / "made_up.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = MODEL_SETTINGS | (model_settings or {})
    return make_task(data, _word_tokenizer(), settings, work_dir=work_dir, device=device)


def _word_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, and one that ends a text."""
    vocabulary = {f"w{number}": number for number in range(NUM_WORDS)} | {END: NUM_WORDS}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)
