"""Made-up attempts of an agent at a shop's order desk, with tools, as data, and a tiny model that trains on them.

    python examples/order_desk.py desk          # writes desk/model, desk/trajectories.jsonl and desk/calls.jsonl

docs/agent_trajectories.md goes on from there.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Message = dict[str, Any]
NUM_TASKS = 24
ITEMS = ("kettle", "lamp", "backpack", "keyboard", "blanket", "bicycle pump")
POLICY = (
    "You work at the order desk of a shop. Look an order up before you say anything about it. Money goes back only for "
    "orders that were delivered at most 30 days ago; tell the customer how many days it has been. Never promise what "
    "the tools have not confirmed, and answer in one or two sentences."
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {"type": "object", "properties": {"order": {"type": "string"}}, "required": ["order"]},
        },
    }
    for name, description in (
        ("look_up", "What was ordered, and how many days ago it was delivered."),
        ("refund", "Send the money for an order back."),
    )
]
CHAT_TEMPLATE = """
{%- if tools -%}
    {{- '<|im_start|>system\\n' + messages[0].content + '\\n\\n# Tools\\n' -}}
    {%- for tool in tools -%}{{- tool | tojson + '\\n' -}}{%- endfor -%}
    {{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if not (tools and loop.first) -%}
        {{- '<|im_start|>' + message.role + '\\n' + message.content -}}
        {%- for call in message.tool_calls or [] -%}
            {{- '<tool_call>{"name": "' + call.function.name + '", "arguments": ' -}}
            {{- call.function.arguments | tojson + '}</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def make_tasks(num_tasks: int = NUM_TASKS) -> list[dict[str, Any]]:
    """Rows of whole trajectories: four attempts at each task, of which one does what the policy asks."""
    generator = random.Random(0)
    rows = []
    for number in range(num_tasks):
        item, days = generator.choice(ITEMS), generator.randint(3, 60)
        order = f"W{generator.randrange(1000, 9999)}"
        attempts = [
            {"messages": messages, "score": float(score)} for messages, score in make_attempts(order, item, days)
        ]
        rows.append({"id": f"order-{number}", "trajectories": attempts, "tools": TOOLS})
    return rows


def make_attempts(order: str, item: str, days: int) -> Iterator[tuple[list[Message], int]]:
    """Messages and score of each attempt.

    All begin alike. The second leaves the first after the order was looked up, the third after the customer has asked
    again, and the fourth never looks.
    """
    may_refund = days <= 30
    begun = [
        {"role": "system", "content": POLICY},
        {"role": "user", "content": f"Hello, I want my money back for the {item}, order {order}."},
    ]
    looked = [
        *begun,
        *_call("look_up", order, {"order": order, "item": item, "delivered_days_ago": days}),
    ]
    asked = [
        *looked,
        _says(f"I found your {item}. It was delivered {days} days ago. Shall I check whether money can go back?"),
        {"role": "user", "content": "Yes, please."},
    ]
    refunded = _call("refund", order, {"order": order, "status": "sent"})
    good = [*refunded, _says("Done, the money is on its way to you.")]
    refused = [_says(f"I am sorry, {days} days are more than the 30 for which money goes back.")]
    yield [*asked, *(good if may_refund else refused)], 1
    yield [*looked, _says("I am sure that we can do that. Have a nice day!")], 0
    yield [*asked, *(refused if may_refund else good)], 0
    yield [*begun, _says("We never send money back.")], 0


def calls_of(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The same trajectories as one row per call of the model, as an agent's log has them."""
    for attempt, trajectory in enumerate(row["trajectories"]):
        messages = trajectory["messages"]
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                yield {
                    "id": row["id"],
                    "attempt": attempt,
                    "messages": messages[:index],
                    "response": message,
                    "score": trajectory["score"],
                    "tools": row["tools"],
                }


def make_tokenizer(rows: list[dict[str, Any]]) -> PreTrainedTokenizerFast:
    """Byte pairs of the rows' own text, and a chat template that writes tools."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=sorted(alphabet), show_progress=False)
    core.train_from_iterator([json.dumps(row) for row in rows], trainer)
    core.add_special_tokens([AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=CHAT_TEMPLATE
    )


def make_model(vocab_size: int) -> LlamaForCausalLM:
    """A Llama of two layers with random weights, always the same."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def write(folder: Path, num_tasks: int = NUM_TASKS) -> None:
    """Write the model with its tokenizer, and both forms of the data."""
    rows = make_tasks(num_tasks)
    tokenizer = make_tokenizer(rows)
    tokenizer.save_pretrained(folder / "model")
    make_model(len(tokenizer)).save_pretrained(folder / "model")
    forms = {"trajectories.jsonl": rows, "calls.jsonl": [call for row in rows for call in calls_of(row)]}
    for name, lines in forms.items():
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def _says(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _call(name: str, order: str, result: dict[str, Any]) -> list[Message]:
    function = {"name": name, "arguments": {"order": order}}
    return [
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
        {"role": "tool", "content": json.dumps(result)},
    ]


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("desk")
    write(target)
    print(f"written: {target}/model, {target}/trajectories.jsonl, {target}/calls.jsonl")
