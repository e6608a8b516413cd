"""A tiny vision-language model learns from preferences which colour a shape in a picture has. No download, no GPU.

Pictures of two shapes are drawn, and the colour of each shape is asked for. A short phase of `sft` comes first, then
`dpo`: the right colour is preferred to a wrong one. Before, between and after, questions on pictures that are not
trained on are answered with the most probable of six colours. About four minutes on two cores:
``python examples/coloured_shapes.py --output outputs/shapes``.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from shapes import COLOURS, SHAPES, SIZE, all_answers, draw_scene, preference, write_rows
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

import kvpref
from kvpref.data import PreferenceDataset, load_preferences

PATCH = 8
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %} {% endif %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<image> {% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% if message.role == 'assistant' %}<end>{% endif %}{% endfor %}"
)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is drawn and trained."""

    num_train: int = 2000
    """Pictures to train on, with a question for each of their two shapes."""

    num_held_out: int = 250
    """Other pictures."""

    num_sft_steps: int = 200
    """Steps of 48 questions."""

    num_dpo_steps: int = 700
    """The same of the second phase."""

    seed: int = 0
    """Of pictures, weights and training."""


def build_processor() -> LlavaProcessor:
    """A word for a token, and pictures in patches of 8 x 8 pixels."""
    words = ["<pad>", "<end>", "<image>", "which", "colour", "is", "the", "?", *SHAPES, *COLOURS]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<end>", pad_token="<pad>", extra_special_tokens={"image_token": "<image>"}
    )
    sides = {"height": SIZE, "width": SIZE}
    image_processor = LlavaImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=sides)
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def build_model(processor: LlavaProcessor, seed: int) -> LlavaForConditionalGeneration:
    """A tower of two layers, a projector and a language model of three, with random weights."""
    torch.manual_seed(seed)
    tokenizer: Any = processor.tokenizer
    vision = {"model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
    text = {"model_type": "llama", "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3}
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config={**vision, "num_attention_heads": 4, "image_size": SIZE, "patch_size": PATCH},
            text_config={
                **text,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "vocab_size": len(tokenizer),
                "max_position_embeddings": 128,
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
                "bos_token_id": None,
            },
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            vision_feature_layer=-1,
            image_seq_length=(SIZE // PATCH) ** 2,
        )
    )


@torch.no_grad()
def answer(model: Any, questions: PreferenceDataset) -> list[int]:
    """The most probable colour of each question, as its number; prompt and picture are encoded once for all six."""
    found: list[int] = []
    model.eval()
    for first in range(0, len(questions), 100):
        groups = [questions[index] for index in range(first, min(first + 100, len(questions)))]
        sums = kvpref.response_logps(model, kvpref.collate(groups)).sum()
        found.extend(sums.view(len(groups), len(COLOURS)).argmax(1).tolist())
    return found


def accuracy(answers: list[int], questions: PreferenceDataset) -> float:
    """The share of right answers."""
    right = [group.scores[index] == 1.0 for index, group in zip(answers, questions, strict=True)]
    return sum(right) / len(right)


def train(model: Any, processor: Any, rows: str, loss: str, num_steps: int, folder: Path) -> list[tuple[int, float]]:
    """Train, and return the loss from time to time."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        args = kvpref.PreferenceTrainingArguments(
            output_dir=scratch,
            loss=loss,
            max_steps=num_steps,
            per_device_train_batch_size=48,
            learning_rate=1e-3,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.2},
            logging_steps=max(1, num_steps // 20),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = kvpref.PreferenceTrainer(model, args, rows, processing_class=processor)
        trainer.train()
    return [(line["step"], line["loss"]) for line in trainer.state.log_history if "loss" in line]


def run(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Draw, train and measure; the result, which is also written to ``result.json`` and ``result.png``."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    start, rng = time.perf_counter(), random.Random(sizes.seed)
    scenes = [draw_scene(folder, index, rng) for index in range(sizes.num_train + sizes.num_held_out)]
    asked = [(scene, shape) for scene in scenes for shape in scene.colours]
    first = 2 * sizes.num_train
    rows = write_rows(folder, "train", [preference(*item, rng) for item in asked[:first]])
    processor = build_processor()
    held_out = load_preferences(
        write_rows(folder, "held_out", [all_answers(*item) for item in asked[first:]]), processor
    )
    model = kvpref.attach(build_model(processor, sizes.seed))
    answers, losses, seconds = {"start": answer(model, held_out)}, {}, {}
    for loss, num_steps in (("sft", sizes.num_sft_steps), ("dpo", sizes.num_dpo_steps)):
        before = time.perf_counter()
        losses[loss] = train(model, processor, rows, loss, num_steps, folder)
        seconds[loss] = round(time.perf_counter() - before, 1)
        answers[loss] = answer(model, held_out)
        print(f"after {loss}: {accuracy(answers[loss], held_out):.1%} right", flush=True)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    result = {
        "accuracy": {stage: accuracy(found, held_out) for stage, found in answers.items()},
        "chance": 1 / len(COLOURS),
        "num_questions": len(held_out),
        "num_parameters": sum(item.numel() for item in model.parameters()),
        "losses": losses,
        "seconds": {**seconds, "all": round(time.perf_counter() - start, 1)},
        "sizes": asdict(sizes),
        "versions": {item.__name__: item.__version__ for item in (torch, transformers, kvpref)},
    }
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    draw_result(result, [(folder / scene.path, shape) for scene, shape in asked[first:]], answers, held_out, folder)
    return result


def draw_result(
    result: dict[str, Any],
    asked: list[tuple[Path, str]],
    answers: dict[str, list[int]],
    questions: PreferenceDataset,
    folder: Path,
) -> None:
    """Some pictures with the answers before and after, and the share of right ones; nothing without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subfigures(1, 2, width_ratios=(1, 2.4))
    bars = left.subplots()
    stages = {"start": "start", "sft": "after sft", "dpo": "after dpo"}
    shares = [100 * result["accuracy"][stage] for stage in stages]
    drawn = bars.bar(list(stages.values()), shares, color=["#8a8f98", "#c98a1b", "#1b7f5c"])
    # On white: the line of chance may run through.
    bars.bar_label(drawn, fmt="%.0f%%", padding=3, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
    bars.axhline(100 * result["chance"], color="#555555", linestyle=":", label="chance")
    bars.set(title=f"{result['num_questions']} held-out questions", ylabel="right answers (%)", ylim=(0, 110))
    bars.legend(frameon=False, loc="upper left")
    bars.spines[["top", "right"]].set_visible(False)
    names = list(COLOURS)
    for axes, index in zip(right.subplots(2, 5).flat, range(0, 20, 2), strict=True):
        path, shape = asked[index]
        axes.imshow(Image.open(path))
        axes.set_axis_off()
        told = [names[answers[stage][index]] for stage in stages]
        is_right = questions[index].scores[answers["dpo"][index]] == 1.0
        axes.set_title(f"the {shape}?\n{' → '.join(told)}", fontsize=8, color="#1b7f5c" if is_right else "#b3261e")
    right.suptitle("answers at the start → after sft → after dpo", fontsize=10)
    figure.savefig(folder / "result.png", dpi=110)


def main() -> dict[str, Any]:
    """What runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/shapes"), help="folder for pictures and results")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    result = run(Sizes(seed=options.seed), options.output)
    print(json.dumps({"accuracy": result["accuracy"], "seconds": result["seconds"]}))
    return result


if __name__ == "__main__":
    main()
