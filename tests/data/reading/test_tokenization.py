"""Texts to groups: which tokens are scored, where BOS and EOS go, and that nothing is joined from parts."""

from __future__ import annotations

import pytest

from kvpref.data import DataOptions, PreferenceDataset, load_preferences
from kvpref.data.reading.rendering import render_row
from kvpref.data.reading.rows import parse_row
from kvpref.data.reading.tokenization import load_tokenizer
from kvpref.errors import InputError
from kvpref.records.groups import Sequence

USER = {"role": "user", "content": "hello"}
GOOD = {"role": "assistant", "content": "world"}
POOR = {"role": "assistant", "content": "fox"}


@pytest.fixture
def load(write_jsonl):
    def load_rows(tokenizer, *rows, **options) -> PreferenceDataset:
        return load_preferences(write_jsonl(*rows), tokenizer, DataOptions(**options))

    return load_rows


def scored_text(tokenizer, sequence: Sequence) -> str:
    return tokenizer.decode([token for token, flag in zip(sequence.input_ids, sequence.scored, strict=True) if flag])


def prompt_text(tokenizer, sequence: Sequence) -> str:
    return tokenizer.decode(
        [token for token, flag in zip(sequence.input_ids, sequence.scored, strict=True) if not flag]
    )


def is_suffix(flags: tuple[bool, ...]) -> bool:
    return list(flags) == sorted(flags)


def test_pair_scores_the_response_and_one_eos(tokenizer, load):
    group = load(tokenizer, {"prompt": "hello", "chosen": " world", "rejected": " fox jumps"})[0]
    assert group.labels == (True, False)
    assert group.scores is None
    for sequence, response in zip(group.sequences, (" world", " fox jumps"), strict=True):
        assert list(sequence.input_ids) == [*tokenizer("hello" + response)["input_ids"], tokenizer.eos_token_id]
        assert prompt_text(tokenizer, sequence) == "hello"
        assert scored_text(tokenizer, sequence) == response + "</s>"
        assert is_suffix(sequence.scored)


def test_group_id_is_its_location(tokenizer, load, write_jsonl):
    rows = [{"prompt": "a", "responses": ["b"]}] * 2
    assert [group.id for group in load(tokenizer, *rows)] == [f"{write_jsonl(*rows)}:{line}" for line in (1, 2)]


def test_token_that_straddles_the_boundary_belongs_to_the_response(tokenizer, load):
    merged = tokenizer("hello world")["input_ids"]
    assert len(merged) == 2, "the fixture must merge ' world' into one token"
    group = load(tokenizer, {"prompt": "hello wor", "chosen": "ld", "rejected": "king"})[0]
    chosen, rejected = group.sequences
    assert chosen.input_ids == (*merged, tokenizer.eos_token_id)
    assert chosen.scored == (False, True, True)
    assert rejected.input_ids == (*tokenizer("hello working")["input_ids"], tokenizer.eos_token_id)
    assert scored_text(tokenizer, rejected) == "king</s>"


def test_response_inside_a_multibyte_character_boundary(tokenizer, load):
    # The emoji is four byte tokens with the same offsets; all of them are the response.
    sequence = load(tokenizer, {"prompt": "hello", "responses": ["😀"]})[0].sequences[0]
    assert scored_text(tokenizer, sequence) == "😀</s>"
    assert prompt_text(tokenizer, sequence) == "hello"


@pytest.mark.parametrize(
    ("prompt", "response", "scored"),
    [
        ("hello", " world", "o world"),  # the token "o " holds the response's space
        ("hello ", "world", "world"),
        ("hello", "  world", "o  world"),
        ("hex  ", "world", "world"),  # a token of spaces alone is all prompt, although its offsets are empty
        ("hex  ", " world", " world"),
        ("hex", " world", " world"),
        ("hex", "  world", "  world"),
    ],
)
def test_spaces_that_trimmed_offsets_hide(load, prompt, response, scored, space_trimming_tokenizer):
    assert space_trimming_tokenizer("o ", return_offsets_mapping=True)["offset_mapping"] == [(0, 1)], (
        "the fixture must trim"
    )
    sequence = load(space_trimming_tokenizer, {"prompt": prompt, "responses": [response]})[0].sequences[0]
    assert scored_text(space_trimming_tokenizer, sequence) == scored + "</s>"


@pytest.mark.parametrize("pad_is_eos", [False, True])
@pytest.mark.parametrize("adds_eos", [False, True])
@pytest.mark.parametrize("response", [" world", " world</s>"])
def test_eos_comes_once(load, pad_is_eos, adds_eos, response, build_tokenizer):
    tokenizer = build_tokenizer(pad_is_eos=pad_is_eos, adds_eos=adds_eos)
    sequence = load(tokenizer, {"prompt": "hello", "responses": [response]})[0].sequences[0]
    assert sequence.input_ids == (*build_tokenizer()("hello world")["input_ids"], tokenizer.eos_token_id)
    assert sequence.scored == (False, True, True)


def test_eos_inside_the_texts_is_kept_and_the_mask_is_not_found_by_ids(load, build_tokenizer):
    tokenizer = build_tokenizer(pad_is_eos=True)
    sequence = load(tokenizer, {"prompt": "hello</s></s>", "responses": [" world</s> fox"]})[0].sequences[0]
    assert prompt_text(tokenizer, sequence) == "hello</s></s>"
    assert scored_text(tokenizer, sequence) == " world</s> fox</s>"


def test_tokenizer_without_eos_adds_none(load, build_tokenizer):
    tokenizer = build_tokenizer(eos=False)
    sequence = load(tokenizer, {"prompt": "hello", "responses": [" world"]})[0].sequences[0]
    assert list(sequence.input_ids) == tokenizer("hello world")["input_ids"]


@pytest.mark.parametrize("prompt", ["hello", "<s>hello"])
def test_bos_that_the_tokenizer_adds_comes_once_and_unscored(load, prompt, build_tokenizer):
    tokenizer = build_tokenizer(adds_bos=True)
    sequence = load(tokenizer, {"prompt": prompt, "responses": [" world"]})[0].sequences[0]
    assert list(sequence.input_ids) == [*tokenizer("hello world")["input_ids"], tokenizer.eos_token_id]
    assert sequence.input_ids.count(tokenizer.bos_token_id) == 1
    assert scored_text(tokenizer, sequence) == " world</s>"


def test_empty_prompt_gets_bos(tokenizer, load):
    group = load(tokenizer, {"prompt": "", "chosen": "hello", "rejected": "world"})[0]
    for sequence in group.sequences:
        assert sequence.input_ids[0] == tokenizer.bos_token_id
        assert sequence.scored[0] is False
        assert all(sequence.scored[1:])


def test_prompt_swallowed_by_one_response_gives_bos_to_all(tokenizer, load):
    # "hel" + "lo" is one token, so its response starts at the first token; "hel" + "p" leaves a prompt.
    group = load(tokenizer, {"prompt": "hel", "responses": ["lo", "p"]})[0]
    assert [sequence.input_ids[0] for sequence in group.sequences] == [tokenizer.bos_token_id] * 2
    assert group.sequences[0].scored == (False, True, True)
    assert scored_text(tokenizer, group.sequences[1]) == "p</s>"


def test_empty_prompt_without_bos_is_a_bad_row(load, write_jsonl, build_tokenizer):
    rows = [{"prompt": "hello", "responses": [" fox"]}, {"prompt": "", "responses": ["fox"]}]
    with pytest.raises(InputError, match=r"rows\.jsonl:2: a response starts at the very first token.*no BOS token"):
        load(build_tokenizer(bos=False), *rows)


def test_implicit_prompt_is_the_common_token_prefix(tokenizer, load):
    group = load(tokenizer, {"chosen": "the quick fox", "rejected": "the quick dog"})[0]
    assert [scored_text(tokenizer, sequence) for sequence in group.sequences] == [" fox</s>", " dog</s>"]
    for first, second in (("the fox", "hello fox"), ("<s>the fox", "<s>hello fox")):
        with pytest.raises(InputError, match=r":1: .*no common beginning, so there is no prompt; add a `prompt`"):
            load(tokenizer, {"chosen": first, "rejected": second})
    # Letters in common are not enough: the model reads tokens.
    with pytest.raises(InputError, match="no common beginning"):
        load(tokenizer, {"chosen": "the", "rejected": "tfox"})
    no_prompt = load(tokenizer, {"prompt": "", "chosen": "the fox", "rejected": "hello fox"})[0]
    assert [prompt_text(tokenizer, sequence) for sequence in no_prompt.sequences] == ["<s>", "<s>"]


def test_implicit_prompt_where_one_text_begins_the_other_scores_its_eos(tokenizer, load, build_tokenizer):
    group = load(tokenizer, {"chosen": "hello world", "rejected": "hello world fox"})[0]
    assert [scored_text(tokenizer, sequence) for sequence in group.sequences] == ["</s>", " fox</s>"]
    with pytest.raises(InputError, match="do not differ after their common beginning"):
        load(build_tokenizer(eos=False), {"chosen": "hello world", "rejected": "hello world fox"})


def test_chat_rows_follow_the_template(chat_tokenizer, load):
    prompt = [{"role": "system", "content": "the"}, USER, POOR, USER]
    group = load(chat_tokenizer, {"prompt": prompt, "chosen": [GOOD], "rejected": "fox"})[0]
    for sequence, answer in zip(group.sequences, (GOOD, POOR), strict=True):
        text = chat_tokenizer.apply_chat_template([*prompt, answer], tokenize=False)
        assert list(sequence.input_ids) == chat_tokenizer(text, add_special_tokens=False)["input_ids"]
        # The template ends the turn itself, so no </s> is put behind it.
        assert scored_text(chat_tokenizer, sequence) == f"{answer['content']}<|im_end|>\n"
        assert prompt_text(chat_tokenizer, sequence).endswith("<|im_start|>assistant\n")


def test_implicit_chat_rows_equal_explicit_ones(chat_tokenizer, load):
    implicit = load(chat_tokenizer, {"chosen": [USER, GOOD], "rejected": [USER, POOR]})
    explicit = load(chat_tokenizer, {"prompt": [USER], "chosen": GOOD, "rejected": POOR})
    assert implicit.fingerprint == explicit.fingerprint


def test_chat_template_without_end_of_turn_gets_eos(load, build_tokenizer):
    tokenizer = build_tokenizer(chat_template="{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}")
    sequence = load(tokenizer, {"prompt": [USER], "responses": [[GOOD]]})[0].sequences[0]
    assert tokenizer.decode(sequence.input_ids) == "user hello assistant world </s>"
    # No generation prompt: what follows the prompt's text is the response.
    assert scored_text(tokenizer, sequence).lstrip() == "assistant world </s>"


def test_chat_template_that_ends_with_eos_and_a_newline_gets_no_second_one(load, build_tokenizer):
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}</s>\n{% endfor %}"
    tokenizer = build_tokenizer(chat_template=template, adds_bos=True)
    sequence = load(tokenizer, {"prompt": [USER], "responses": ["world"]})[0].sequences[0]
    assert tokenizer.decode(sequence.input_ids) == "<s>hello</s>\nworld</s>\n"


def test_chat_template_decides_about_bos(load, build_tokenizer, chat_template):
    tokenizer = build_tokenizer(chat_template=chat_template, adds_bos=True)
    sequence = load(tokenizer, {"prompt": [USER], "responses": ["world"]})[0].sequences[0]
    assert tokenizer.bos_token_id not in sequence.input_ids


def test_chat_template_that_rewrites_the_prompt_uses_the_common_beginning(load, build_tokenizer, chat_template):
    template = chat_template.replace("assistant\n{% endif %}", "assistant\nthink{% endif %}")
    tokenizer = build_tokenizer(chat_template=template)
    sequence = load(tokenizer, {"prompt": [USER], "responses": ["world"]})[0].sequences[0]
    assert scored_text(tokenizer, sequence) == "world<|im_end|>\n"


def test_messages_without_chat_template_say_what_to_do_even_when_skipping(tokenizer, load):
    rows = [{"prompt": "a", "responses": ["b"]}, {"prompt": [USER], "responses": ["b"]}]
    with pytest.raises(InputError, match=r"rows\.jsonl:2: .*no chat template; use the tokenizer of a chat model"):
        load(tokenizer, *rows, on_bad_row="skip")


def test_chat_template_that_refuses_is_a_bad_row(load, build_tokenizer, chat_template):
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + chat_template
    row = {"prompt": [{"role": "system", "content": "x"}, USER], "responses": ["world"]}
    with pytest.raises(InputError, match=r"rows\.jsonl:1: the chat template refuses the messages \(no system role\)"):
        load(build_tokenizer(chat_template=template), row)


def test_chat_template_that_writes_nothing_for_a_response(load, build_tokenizer):
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(InputError, match="writes nothing for it"):
        load(build_tokenizer(chat_template=template), {"prompt": [USER], "responses": ["world"]})


def test_response_that_the_tokenizer_drops_is_a_bad_row(load, build_tokenizer):
    from tokenizers import normalizers

    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    with pytest.raises(InputError, match=r"rows\.jsonl:1: a response is empty: the tokenizer makes no tokens from it"):
        load(tokenizer, {"prompt": "hello", "responses": ["\u200b"]})


def test_slow_tokenizer_scores_from_the_first_token_that_differs(load, slow_tokenizer):
    group = load(slow_tokenizer, {"prompt": "d ab", "responses": ["c", "f"]})[0]
    tokens = [slow_tokenizer.convert_ids_to_tokens(list(sequence.input_ids)) for sequence in group.sequences]
    assert tokens == [["d", " ", "abc", "</s>"], ["d", " ", "ab", "f", "</s>"]]
    assert [sequence.scored.index(True) for sequence in group.sequences] == [2, 3]


def test_slow_tokenizer_reads_implicit_prompts_and_empty_ones(load, slow_tokenizer):
    implicit = load(slow_tokenizer, {"chosen": "abcd", "rejected": "abce"})[0]
    assert [sequence.scored for sequence in implicit.sequences] == [(False, True, True)] * 2
    swallowed = load(slow_tokenizer, {"prompt": "ab", "responses": ["c"]})[0].sequences[0]
    assert slow_tokenizer.convert_ids_to_tokens(list(swallowed.input_ids)) == ["<s>", "abc", "</s>"]
    assert swallowed.scored == (False, True, True)


TURNS = "{% for m in messages %}{{ ' ' if m.role == 'assistant' else ' f' }}{{ m.content }}{% endfor %}"


def test_slow_tokenizer_scores_the_assistants_turns(load, slow_tokenizer):
    slow_tokenizer.chat_template = TURNS
    prompt = [{"role": "user", "content": "d"}]
    turns = [
        {"role": role, "content": content} for role, content in zip(("assistant", "user") * 2, "abca", strict=True)
    ]
    [sequence] = load(slow_tokenizer, {"prompt": prompt, "responses": [turns[:3]]})[0].sequences
    tokens = slow_tokenizer.convert_ids_to_tokens(list(sequence.input_ids))
    assert list(zip(tokens, sequence.scored, strict=True)) == [
        *((token, False) for token in " fd"),
        *((token, True) for token in " a"),
        *((token, False) for token in " fb"),
        *((token, True) for token in (" ", "c", "</s>")),
    ]
    # A response that a user ends gets no EOS: nothing of it would be the assistant's.
    [sequence] = load(slow_tokenizer, {"prompt": prompt, "responses": [turns]})[0].sequences
    assert "".join(slow_tokenizer.convert_ids_to_tokens(list(sequence.input_ids))) == " fd a fb c fa"
    assert sequence.scored[-3:] == (False, False, False)


def test_slow_tokenizer_that_joins_the_end_of_a_turn_with_the_next(load, slow_tokenizer):
    slow_tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    turns = [{"role": role, "content": text} for role, text in (("assistant", "ab"), ("user", "c"), ("assistant", "d"))]
    with pytest.raises(
        InputError, match=r"rows\.jsonl:2: the tokenizer joins the end of a turn .* use a fast tokenizer"
    ):
        load(
            slow_tokenizer,
            {"prompt": "d", "responses": ["a"]},
            {"prompt": [USER | {"content": "d"}], "responses": [turns]},
        )


def test_rendering_is_text_only(chat_tokenizer):
    rendered = render_row(parse_row({"prompt": [USER], "responses": ["world"]}), chat_tokenizer)
    prompt = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert rendered.texts == (f"{prompt}world<|im_end|>\n",)
    assert rendered.spans == (((len(prompt), len(rendered.texts[0])),),)


def test_load_tokenizer_names_the_folder_that_holds_none(tmp_path):
    with pytest.raises(InputError, match="no tokenizer can be loaded"):
        load_tokenizer(str(tmp_path))
