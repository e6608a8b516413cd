"""Chat templates with tools, and small agents' conversations to write with them."""

from __future__ import annotations

import json
from typing import Any

from chat_families import build_byte_tokenizer

Message = dict[str, Any]

CALLS = (
    "{%- for call in m.tool_calls or [] -%}"
    "<call>{{ call.function.name }} {{ call.function.arguments | tojson }}</call>"
    "{%- endfor -%}"
)
ASKS = "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
TOOLS = "{%- for tool in tools or [] -%}<|tool|>{{ tool.function.name }}<|end|>{%- endfor -%}"

PLAIN = (
    TOOLS + "{%- for m in messages -%}<|{{ m.role }}|>{{ m.content or '' }}" + CALLS + "<|end|>{%- endfor -%}" + ASKS
)
"""What it writes of a turn never changes."""

MARKED = (
    TOOLS
    + "{%- for m in messages -%}<|{{ m.role }}|>"
    + "{%- if m.role == 'assistant' -%}{%- generation -%}{{ m.content or '' }}"
    + CALLS
    + "<|end|>{%- endgeneration -%}{%- else -%}{{ m.content or '' }}<|end|>{%- endif -%}{{ '\\n' }}{%- endfor -%}"
    + ASKS
)
"""Marks what the model generates."""

THINKS = (
    TOOLS
    + "{%- set ns = namespace(asked=0) -%}"
    + "{%- for m in messages if m.role == 'user' -%}{%- set ns.asked = messages.index(m) -%}{%- endfor -%}"
    + "{%- for m in messages -%}<|{{ m.role }}|>"
    + "{%- if m.reasoning_content and loop.index0 > ns.asked -%}<think>{{ m.reasoning_content }}</think>{%- endif -%}"
    + "{{ m.content or '' }}"
    + CALLS
    + "<|end|>{%- endfor -%}"
    + ASKS
)
"""Drops the thinking of turns before the last question, as Qwen 3's does."""

RAISES = (
    "{%- for m in messages -%}{%- if m.role == 'tool' and not m.tool_call_id -%}"
    "{{- raise_exception('a tool result needs its tool_call_id') -}}{%- endif -%}{%- endfor -%}" + PLAIN
)
"""Refuses results of tools that do not say which call they answer."""

SPECIALS = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>", "<s>")


def build_agent_tokenizer(template: str) -> Any:
    """One token per byte, and per special token."""
    return build_byte_tokenizer(SPECIALS, bos_token="<s>", eos_token="<|end|>", chat_template=template)


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "id": f"call-{name}", "function": {"name": name, "arguments": arguments}}


def say(role: str, content: str | None, **more: Any) -> Message:
    return {"role": role, "content": content, **more}


def conversation(answer: str, *, thinks: bool = False) -> list[Message]:
    """Two questions, a call of two tools at once, and four assistant turns."""
    think = {"reasoning_content": "hm"} if thinks else {}
    return [
        say("system", "be brief"),
        say("user", "weather?"),
        say("assistant", None, tool_calls=[call("look", city="Rome"), call("look", city="Oslo")], **think),
        say("tool", "sun", tool_call_id="call-look"),
        say("tool", "snow", tool_call_id="call-look"),
        say("assistant", answer, **think),
        say("user", "sure?"),
        say("assistant", "yes", **think),
        say("user", "bye"),
        say("assistant", f"bye {answer}", **think),
        say("user", "###STOP###"),
    ]


def written_turn(message: Message, *, thinks: bool = False) -> str:
    """What every template above writes of an assistant turn, by hand."""
    thought = f"<think>{message['reasoning_content']}</think>" if thinks else ""
    functions = [item["function"] for item in message.get("tool_calls", ())]
    calls = [f"<call>{item['name']} {json.dumps(item['arguments'])}</call>" for item in functions]
    return f"{thought}{message['content'] or ''}{''.join(calls)}<|end|>"


def calls_of(messages: list[Message], **more: Any) -> list[dict[str, Any]]:
    """The same as rows of model calls."""
    return [
        {"messages": messages[:index], "response": message, **more}
        for index, message in enumerate(messages)
        if message["role"] == "assistant"
    ]


def scored_texts(sequence: Any, tokenizer: Any) -> list[str]:
    """The runs of scored tokens of all parts, as text."""
    return [tokenizer.decode(part.ids[first:stop].tolist()) for part in sequence.parts for first, stop in part.turns]
