"""Sequences hold what the model's processor makes of the whole prompt, with each image in its place."""

from __future__ import annotations

import json
import pickle

import datasets
import pytest
import torch
from image_processors import KINDS, build_processor
from vision_models import picture

from kvpref.data import DataOptions, load_preferences
from kvpref.errors import InputError, RunError

PICTURES = [picture(1), picture(2, 64, 36), picture(3, 30, 52)]
SAMPLED = ("qwen2_5_vl", "gemma3", "llava_onevision", "idefics3", "paligemma", "mllama")
NAMES = [name if name in SAMPLED else pytest.param(name, marks=pytest.mark.full) for name in KINDS]
IMAGE = {"type": "image"}


def question(num_images, text="What?"):
    return [{"role": "user", "content": [*[IMAGE] * num_images, {"type": "text", "text": text}]}]


def row(num_images, name="qwen2_5_vl", **changes):
    prompt = question(num_images) if KINDS[name].template else "What?"
    return {"prompt": prompt, "images": PICTURES[:num_images], "chosen": "A", "rejected": "Bc", **changes}


@pytest.mark.parametrize("name", NAMES)
def test_prompts_are_the_processors_own(name):
    processor = build_processor(name)
    for count in (1, 2, 3):
        [group] = load_preferences([row(count, name)], processor)
        if KINDS[name].template:
            text = processor.apply_chat_template(question(count), add_generation_prompt=True)
        else:
            text = processor.image_token * count + "What?"
        own = processor(text=[text], images=[PICTURES[:count]], return_tensors="pt", add_special_tokens=False)
        for sequence, response in zip(group.sequences, ("A", "Bc"), strict=True):
            start = sequence.scored.index(True)
            assert list(sequence.input_ids[:start]) == own["input_ids"][0].tolist()
            assert processor.tokenizer.decode(sequence.input_ids[start:]).startswith(response)
            [*images] = sequence.images
            marked = [place for _, runs in images for run in runs for place in range(*run)]
            assert marked == [at for at, token in enumerate(sequence.input_ids) if token == images[0].image.token_id]
        read = [image.read() for image, _ in group.sequences[0].images]
        assert set(read[0]) == {key for key in own if key.startswith(("pixel", "image", "aspect", "batch"))}
        if name in ("qwen2_5_vl", "gemma3", "paligemma", "internvl", "aya_vision", "llava"):
            assert torch.equal(torch.cat([item["pixel_values"] for item in read]), own["pixel_values"])


def test_images_that_are_processed_together_are_one():
    processor = build_processor("llava_onevision")
    [group] = load_preferences([row(2, "llava_onevision")], processor)
    [[image, runs]] = group.sequences[0].images
    own = processor(text=["<image><image>"], images=[PICTURES[:2]], return_tensors="pt")
    assert image.num_tokens == int((own["input_ids"] == image.token_id).sum()) == sum(b - a for a, b in runs)
    for key, value in image.read().items():
        assert torch.equal(value, own[key]), key
    alone, *_ = load_preferences([row(1, "llava_onevision")], processor)
    assert alone.sequences[0].images[0].image.num_tokens * 2 != image.num_tokens


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "mllama"])
def test_rows_without_images_are_those_of_the_tokenizer(name):
    processor = build_processor(name)
    rows = [
        {"prompt": "2+2? ", "chosen": "4", "rejected": "5"},
        {"prompt": [{"role": "user", "content": "Hi"}], "chosen": "A", "rejected": "B", "images": []},
    ]
    processor.tokenizer.chat_template = processor.chat_template
    assert list(load_preferences(rows, processor)) == list(load_preferences(rows, processor.tokenizer))


def test_images_stand_where_the_messages_have_them_in_several_turns():
    processor = build_processor("qwen2_5_vl")
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "x"}, IMAGE, {"type": "text", "text": "y"}]},
        {"role": "assistant", "content": "Z"},
        {"role": "user", "content": [{"type": "image", "image": PICTURES[1]}]},
    ]
    data = {"prompt": turns, "image": PICTURES[0], "responses": ["A", "BB", "C"], "scores": [1, 2, 3]}
    [group] = load_preferences([data], processor)
    first, second = group.sequences[1].images
    text = processor.tokenizer.decode(group.sequences[1].input_ids)
    pads = "<|image_pad|>"
    assert text.startswith(f"<s>[user] x<|vision_start|>{pads * 4}<|vision_end|>y[assistant] Z[user] <|vision_start|>")
    assert (first.image.num_tokens, second.image.num_tokens) == (4, 8)
    assert torch.equal(
        second.image.read()["pixel_values"],
        processor(text=[pads], images=[PICTURES[1]], return_tensors="pt")["pixel_values"],
    )


def test_a_text_prompt_with_images_is_the_users_message_unless_it_has_places():
    processor = build_processor("qwen2_5_vl")
    rows = [row(1), row(1, prompt="What?"), row(1, prompt="<|vision_start|><|image_pad|><|vision_end|>What?")]
    dataset = load_preferences(rows, processor)
    asked, text, placed = dataset
    assert "a text prompt with images is written as the user's message, by the chat template (1 row)" in (
        dataset.report.notices
    )
    assert asked.sequences == text.sequences
    assert processor.tokenizer.decode(placed.sequences[0].input_ids).startswith("<|vision_start|><|image_pad|>")


def test_templates_that_read_only_parts_get_parts():
    processor = build_processor("llava")
    strings = list(load_preferences([row(1)], processor))
    processor.chat_template = processor.chat_template.replace("message.content is string", "false")
    assert [group.sequences[0].input_ids for group in strings] == [
        group.sequences[0].input_ids for group in load_preferences([row(1)], processor)
    ]
    [plain] = load_preferences([row(0, prompt=[{"role": "user", "content": "Hi"}])], processor)
    assert "Hi" in processor.tokenizer.decode(plain.sequences[0].input_ids)


def test_equal_images_are_one_object_and_different_ones_never_share(tmp_path):
    processor = build_processor("qwen2_5_vl")
    PICTURES[0].save(tmp_path / "a.png")
    rows = [row(1), row(1, images=[str(tmp_path / "a.png")]), row(1, images=[picture(4)])]
    dataset = load_preferences(rows, processor)
    first, same, other = (group.sequences[0] for group in dataset)
    assert first.images[0].image is same.images[0].image
    assert first.tree_ids.tolist() == same.tree_ids.tolist()
    assert first.input_ids == other.input_ids
    assert first.tree_ids.tolist() != other.tree_ids.tolist()
    assert len(dataset.images) == 2
    assert dataset.clusters(3, 4).of_group == (0, 0, 2), "what all begin with is common to them"
    digests = [dataset.digests[start : start + 8] for start in (0, 8, 16)]
    assert digests[0] == digests[1] != digests[2]


def test_settings_of_the_processor_are_a_part_of_the_key():
    processor = build_processor("gemma3")
    before = load_preferences([row(1)], processor)
    processor.image_processor.image_mean = [0.1, 0.1, 0.1]
    after = load_preferences([row(1)], processor)
    assert before.fingerprint != after.fingerprint
    assert before[0].sequences[0].input_ids == after[0].sequences[0].input_ids


def test_data_sets_hold_no_pixels_and_travel(tmp_path):
    PICTURES[0].resize((640, 512)).save(tmp_path / "a.png")
    rows = [row(1, images=["a.png"], chosen=f"A{index}") for index in range(20)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(item)}\n" for item in rows))
    dataset = load_preferences(path, build_processor("gemma3"))
    fingerprint, packed = dataset.fingerprint, pickle.dumps(dataset)
    assert len(packed) < 100_000
    again = pickle.loads(packed)
    assert again.fingerprint == fingerprint
    images = {id(sequence.images[0].image) for group in again for sequence in group.sequences}
    assert len(images) == 1
    read = again[3].sequences[0].images[0].image.read()
    assert torch.equal(read["pixel_values"], dataset.images[0].read()["pixel_values"])
    assert len(pickle.dumps(dataset)) == len(packed), "what was read is not kept with the data"


def test_large_images_are_scaled_down_and_counted():
    processor = build_processor("qwen2_5_vl")
    rows = [row(1, images=[picture(1, 64, 48)]), row(1, images=[picture(1, 64, 48)]), row(1)]
    dataset = load_preferences(rows, processor, DataOptions(max_image_pixels=40 * 32))
    assert dataset.report.num_scaled_images == 1
    assert "1 image" in dataset.report.lines()[1]
    whole = load_preferences(rows, processor)
    assert dataset[0].sequences[0].images[0].image.num_tokens < whole[0].sequences[0].images[0].image.num_tokens
    assert dataset.fingerprint != whole.fingerprint
    smaller = picture(1, 64, 48).resize((41, 30), 3)
    own = processor(text=["<|image_pad|>"], images=[smaller], return_tensors="pt")
    assert torch.equal(dataset.images[0].read()["pixel_values"], own["pixel_values"])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"images": ["gone.png"]}, "gone.png.* does not exist"),
        ({"images": []}, "1 places for images"),
        ({"prompt": question(1, "a <|image_pad|>")}, "1 images and its text 2 times '<|image_pad|>'"),
        ({"chosen": "<|image_pad|>"}, "1 images and its text 2 times"),
        ({"images": [], "prompt": "<|image_pad|>?"}, "stands for an image, and the row has no image for it"),
        (
            {"images": [picture(1, 900, 4)]},
            r"the model's processor refuses the images \(900x4\): absolute aspect ratio",
        ),
    ],
)
def test_bad_rows_are_named(changes, reason):
    processor = build_processor("qwen2_5_vl")
    with pytest.raises(InputError, match=rf"row 2: .*{reason.replace('|', '[|]')}"):
        load_preferences([row(1), row(1, **changes)], processor)
    skipped = load_preferences([row(1, **changes), row(1)], processor, DataOptions(on_bad_row="skip"))
    assert (len(skipped), skipped.report.bad_rows[0].location) == (1, "row 1")


def test_prompts_with_images_are_not_cut():
    processor = build_processor("qwen2_5_vl")
    length = load_preferences([row(1)], processor)[0].sequences[0].scored.index(True)
    assert len(load_preferences([row(1)], processor, DataOptions(max_prompt_tokens=length))) == 1
    with pytest.raises(
        InputError, match=f"{length} tokens, more than max_prompt_tokens={length - 1}, and prompts with"
    ):
        load_preferences([row(1)], processor, DataOptions(max_prompt_tokens=length - 1))
    cut = load_preferences([row(1, chosen="AAAA")], processor, DataOptions(max_response_tokens=2))
    assert len(cut[0].sequences[0].images) == 1


@pytest.mark.parametrize("name", ["pictures", "image_path", "Image", "img_urls"])
def test_images_under_other_names_are_not_overlooked(name, tmp_path):
    texts = {"prompt": question(0), "chosen": "A", "rejected": "Bc"}
    processor = build_processor("qwen2_5_vl")
    with pytest.raises(InputError, match=rf"row 1: `{name}` is not read.*`images`"):
        load_preferences([{**texts, name: ["1.png"]}], processor)
    table = tmp_path / "rows.parquet"
    datasets.Dataset.from_list([{**texts, name: ["1.png"]}]).to_parquet(table)
    with pytest.raises(InputError, match=rf"row 1: `{name}` is not read"):
        load_preferences(str(table), processor)
    assert len(load_preferences([{**row(1), name: ["1.png"]}], processor)) == 1
    plain = {"prompt": "What?", "chosen": "A", "rejected": "Bc", name: ["1.png"]}
    assert len(load_preferences([plain], processor.tokenizer)) == 1  # a model of text has no use for it


def test_images_without_a_processor_are_refused():
    with pytest.raises(InputError, match="the row has images, and a tokenizer alone reads none"):
        load_preferences([row(1)], build_processor("qwen2_5_vl").tokenizer)


def test_other_placeholders_than_when_the_data_was_read_are_noticed():
    processor = build_processor("qwen2_5_vl")
    [image] = load_preferences([row(1)], processor).images
    processor.image_processor.size = {"shortest_edge": 4096, "longest_edge": 8192}
    with pytest.raises(RunError, match=r"writes .* placeholders for an image .* that had 4"):
        image.read()


def test_features_of_datasets_are_not_decoded(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = [row(1, prompt="What?"), row(2, prompt="What?")]
    text = datasets.Value("string")
    made = datasets.Dataset.from_dict(
        {name: [item[name] for item in rows] for name in rows[0]},
        features=datasets.Features(
            {"prompt": text, "images": datasets.List(datasets.Image()), "chosen": text, "rejected": text}
        ),
    )
    processor = build_processor("gemma3")
    monkeypatch.setattr(datasets.Image, "decode_example", None)
    found = load_preferences(made, processor)
    assert found.fingerprint == load_preferences(rows, processor).fingerprint


def test_the_same_rows_in_every_form_of_file_are_the_same_groups(tmp_path):
    datasets = pytest.importorskip("datasets")
    processor = build_processor("qwen2_5_vl")
    names = ["pictures/a.png", "pictures/b.png"]
    (tmp_path / "pictures").mkdir()
    for name, made in zip(names, PICTURES, strict=False):
        made.save(tmp_path / name)
    rows = [
        row(1, images=names[:1]),
        row(2, images=names),
        row(1, images=[], prompt=[{"role": "user", "content": [{"type": "image", "path": names[1]}]}]),
    ]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(item)}\n" for item in rows))
    expected = load_preferences(tmp_path / "rows.jsonl", processor).fingerprint
    assert load_preferences(rows_with_bytes(tmp_path, rows), processor).fingerprint == expected
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "rows.parquet")
    table.save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "pictures").symlink_to(tmp_path / "pictures")
    for source in (tmp_path / "rows.parquet", tmp_path / "saved"):
        assert load_preferences(source, processor).fingerprint == expected, source


def rows_with_bytes(folder, rows):
    """The rows with the images of their columns as `datasets` stores them."""
    changed = [
        {**item, "images": [{"bytes": (folder / name).read_bytes()} for name in item["images"]]} for item in rows
    ]
    own = {"type": "image", "image": str(folder / "pictures/b.png")}
    return [*changed[:2], {**changed[2], "prompt": [{"role": "user", "content": [own]}]}]
