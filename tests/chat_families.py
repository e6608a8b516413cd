"""Families of chat templates, and by hand what each writes: who wrote a text, and whether the model generates it.

A reading is a list of pieces. It is written from what the family's templates look like, without a template engine,
so that joined it proves itself against the template, and its marks prove the spans that are found.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

Message = dict[str, Any]
TEMPLATES = Path(__file__).parent / "data" / "chat_templates"


class Piece(NamedTuple):
    """A part of what a template writes."""

    turn: int
    text: str
    is_generated: bool


@dataclass(frozen=True, kw_only=True)
class Family:
    """One template's tokens, and its reading."""

    read: Callable[[list[Message], str], Iterator[Piece]]
    eos: str
    bos: str | None = None
    specials: tuple[str, ...] = ()
    reasoning_field: str = "reasoning_content"


def build_byte_tokenizer(specials: Iterable[str], **settings: Any) -> PreTrainedTokenizerFast:
    """One token per byte and per special token."""
    vocabulary = {piece: index for index, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in sorted(specials)])
    return PreTrainedTokenizerFast(tokenizer_object=core, **settings)


def build_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a family, with its template."""
    family = FAMILIES[name]
    return build_byte_tokenizer(
        {family.eos, *([family.bos] if family.bos else []), *family.specials},
        bos_token=family.bos,
        eos_token=family.eos,
        chat_template=(TEMPLATES / f"{name}.jinja").read_text(),
    )


def calls_of(message: Message) -> list[tuple[str, dict[str, Any]]]:
    """Names and arguments of the tools that a message calls."""
    return [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls") or []]


def read_llama3(messages: list[Message], rendered: str) -> Iterator[Piece]:
    yield Piece(-1, "<|begin_of_text|>", False)
    for turn, message in enumerate(messages):
        role = {"tool": "ipython"}.get(message["role"], message["role"])
        yield Piece(turn, f"<|start_header_id|>{role}<|end_header_id|>\n\n", False)
        said = message.get("content") or ""
        for name, arguments in calls_of(message):
            said = f'{{"name": "{name}", "parameters": {json.dumps(arguments)}}}'
        yield Piece(turn, f"{said}<|eot_id|>", True)


def read_mistral_v3(messages: list[Message], rendered: str) -> Iterator[Piece]:
    yield Piece(-1, "<s>", False)
    last_user = max(turn for turn, message in enumerate(messages) if message["role"] == "user")
    for turn, message in enumerate(messages):
        calls = [{"name": name, "arguments": arguments} for name, arguments in calls_of(message)]
        if message["role"] == "user":
            system = messages[0]["content"] + "\n\n" if turn == last_user and messages[0]["role"] == "system" else ""
            yield Piece(turn, f"[INST] {system}{message['content']}[/INST]", False)
        elif message["role"] == "tool":
            yield Piece(turn, f'[TOOL_RESULTS] {{"content": {message["content"]}}}[/TOOL_RESULTS]', False)
        elif message["role"] == "assistant":
            # Nothing is written to ask for an answer, so its space is generated, too.
            said = f"[TOOL_CALLS] {json.dumps(calls)}" if calls else f" {message['content']}"
            yield Piece(turn, f"{said}</s>", True)


def qwen_calls(message: Message) -> str:
    return "\n".join(
        f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'
        for name, arguments in calls_of(message)
    )


def read_qwen25(messages: list[Message], rendered: str) -> Iterator[Piece]:
    if messages[0]["role"] != "system":
        yield Piece(-1, "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n", False)
    for turn, message in enumerate(messages):
        if message["role"] == "tool":
            result = f"<tool_response>\n{message['content']}\n</tool_response>"
            yield Piece(turn, f"<|im_start|>user\n{result}<|im_end|>\n", False)
            continue
        yield Piece(turn, f"<|im_start|>{message['role']}\n", False)
        yield Piece(turn, f"{message.get('content') or ''}{qwen_calls(message)}<|im_end|>\n", True)


def read_qwen3(messages: list[Message], rendered: str) -> Iterator[Piece]:
    last_question = max(turn for turn, message in enumerate(messages) if message["role"] == "user")
    for turn, message in enumerate(messages):
        content = message.get("content") or ""
        if message["role"] == "tool":
            result = f"<tool_response>\n{content}\n</tool_response>"
            yield Piece(turn, f"<|im_start|>user\n{result}<|im_end|>\n", False)
            continue
        yield Piece(turn, f"<|im_start|>{message['role']}\n", False)
        if message["role"] == "assistant" and turn > last_question:
            reasoning, _, content = content.rpartition("</think>")
            reasoning = message.get("reasoning_content") or reasoning.removeprefix("<think>").strip("\n")
            if reasoning or turn == len(messages) - 1:
                # The model writes this after the generation prompt, even where it is empty.
                yield Piece(turn, f"<think>\n{reasoning}\n</think>\n\n", True)
            content = content.lstrip("\n")
        yield Piece(turn, f"{content}{qwen_calls(message)}<|im_end|>\n", True)


def read_gemma(messages: list[Message], rendered: str) -> Iterator[Piece]:
    yield Piece(-1, "<bos>", False)
    system = ""
    for turn, message in enumerate(messages):
        if message["role"] == "system":
            system = message["content"] + "\n\n"
            continue
        role = {"assistant": "model"}.get(message["role"], message["role"])
        yield Piece(turn, f"<start_of_turn>{role}\n{system}", False)
        yield Piece(turn, f"{message['content']}<end_of_turn>\n", True)
        system = ""


def read_phi(messages: list[Message], rendered: str) -> Iterator[Piece]:
    for turn, message in enumerate(messages):
        yield Piece(turn, f"<|{message['role']}|>\n", False)
        yield Piece(turn, f"{message['content']}<|end|>\n", True)
    yield Piece(len(messages) - 1, "<|endoftext|>", True)


def read_deepseek_r1(messages: list[Message], rendered: str) -> Iterator[Piece]:
    yield Piece(-1, "<｜begin▁of▁sentence｜>", False)
    for turn, message in enumerate(messages):
        content = message.get("content") or ""
        if message["role"] == "assistant":
            if messages[turn - 1]["role"] != "tool":
                yield Piece(turn, "<｜Assistant｜>", False)
            calls = "".join(
                f"<｜tool▁call▁begin｜>{name}\n{json.dumps(arguments)}<｜tool▁call▁end｜>"
                for name, arguments in calls_of(message)
            )
            if calls:
                content = f"<｜tool▁calls▁begin｜>{calls}<｜tool▁calls▁end｜>"
            yield Piece(turn, f"{content}<｜end▁of▁sentence｜>", True)
        elif message["role"] == "tool":
            yield Piece(turn, f"<｜tool▁output▁begin｜>{content}<｜tool▁output▁end｜>", False)
        else:
            yield Piece(turn, {"user": "<｜User｜>", "system": ""}[message["role"]] + content, False)


def read_gpt_oss(messages: list[Message], rendered: str) -> Iterator[Piece]:
    yield Piece(-1, "<|start|>system<|message|>Valid channels: analysis, commentary, final.<|end|>", False)
    tool = ""
    for turn, message in enumerate(messages):
        content = message.get("content") or ""
        if message["role"] == "assistant":
            yield Piece(turn, "<|start|>assistant", False)
            # All of the header behind the role is the model's to write.
            for tool, arguments in calls_of(message):
                header = f" to=functions.{tool}<|channel|>commentary json<|message|>"
                yield Piece(turn, f"{header}{json.dumps(arguments)}<|call|>", True)
            if not calls_of(message):
                if message.get("thinking"):
                    thought = f"<|channel|>analysis<|message|>{message['thinking']}<|end|>"
                    yield Piece(turn, f"{thought}<|start|>assistant", True)
                end = "<|return|>" if turn == len(messages) - 1 else "<|end|>"
                yield Piece(turn, f"<|channel|>final<|message|>{content}{end}", True)
        elif message["role"] == "tool":
            header = f"<|start|>functions.{tool} to=assistant<|channel|>commentary<|message|>"
            yield Piece(turn, f"{header}{json.dumps(content)}<|end|>", False)
        else:
            header = "user<|message|>" if message["role"] == "user" else "developer<|message|># Instructions\n\n"
            yield Piece(turn, f"<|start|>{header}{content}<|end|>", False)


def read_chatml(messages: list[Message], rendered: str) -> Iterator[Piece]:
    for turn, message in enumerate(messages):
        newline = "\n" if turn else ""
        yield Piece(turn, f"{newline}<|im_start|>{message['role']}\n", False)
        yield Piece(turn, f"{message['content']}<|im_end|>", True)


def read_tool_tags(messages: list[Message], rendered: str) -> Iterator[Piece]:
    for turn, message in enumerate(messages):
        yield Piece(turn, f"<|{message['role']}|>", False)
        calls = "".join(
            f"<function={name}>{''.join(f'<parameter={key}>{value}</parameter>' for key, value in pairs.items())}"
            "</function>"
            for name, pairs in calls_of(message)
        )
        yield Piece(turn, f"{message.get('content') or ''}{calls}<|end_of_text|>\n", True)


def read_no_system(messages: list[Message], rendered: str) -> Iterator[Piece]:
    for turn, message in enumerate(messages):
        if message["role"] == "user":
            yield Piece(turn, f"### Question:\n{message['content']}\n\n", False)
        else:
            yield Piece(turn, "### Answer:\n", False)
            yield Piece(turn, f"{message['content']}</s>\n\n", True)


def read_dated(messages: list[Message], rendered: str) -> Iterator[Piece]:
    found = re.search(r"Today: \d\d \w+ \d{4}\n", rendered)
    assert found is not None
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    yield Piece(-1, f"<s><|start_header_id|>system<|end_header_id|>\n\n{found[0]}{system}<|eot_id|>", False)
    for turn, message in enumerate(messages):
        if message["role"] != "system":
            yield Piece(turn, f"<|start_header_id|>{message['role']}<|end_header_id|>\n\n", False)
            yield Piece(turn, f"{message['content']}<|eot_id|>", True)


HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
IM = ("<|im_start|>", "<|im_end|>")
FAMILIES = {
    "llama3": Family(read=read_llama3, bos="<|begin_of_text|>", eos="<|eot_id|>", specials=HEADERS),
    "mistral_v3": Family(
        read=read_mistral_v3,
        bos="<s>",
        eos="</s>",
        specials=("[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    ),
    "qwen25": Family(read=read_qwen25, eos="<|im_end|>", specials=IM),
    "qwen3": Family(read=read_qwen3, eos="<|im_end|>", specials=IM),
    "gemma": Family(read=read_gemma, bos="<bos>", eos="<eos>", specials=("<start_of_turn>", "<end_of_turn>")),
    "phi": Family(read=read_phi, eos="<|endoftext|>", specials=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
    "deepseek_r1": Family(
        read=read_deepseek_r1,
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
        specials=("<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    ),
    "gpt_oss": Family(
        read=read_gpt_oss,
        eos="<|return|>",
        specials=("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>"),
        reasoning_field="thinking",
    ),
    "chatml": Family(read=read_chatml, eos="<|im_end|>", specials=IM),
    "tool_tags": Family(read=read_tool_tags, eos="<|end_of_text|>", specials=("<|user|>", "<|assistant|>", "<|tool|>")),
    "no_system": Family(read=read_no_system, eos="</s>"),
    "dated": Family(read=read_dated, bos="<s>", eos="</s>", specials=HEADERS),
}
