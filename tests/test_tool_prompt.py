"""Tools, calls and results on their way into a prompt: MiniCPM4's own text, and templates that know of tools."""

from __future__ import annotations

from typing import Any

import pytest

from edge.chat_format.messages import template_messages
from edge.chat_format.tool_prompt import tools_prompt
from edge.chat_format.tools import parse_tools
from edge.errors import UsageError
from tests.chat_samples import NOW, TOOLS, WEATHER
from tests.test_text import tokenizer_of

# What OpenBMB's template (demo/minicpm3/function_call/minicpm_chat_template_with_tool.jinja) makes of the two tools.
FUNCTIONS = '''
# Functions
Here is a list of functions that you can invoke:
```python
from enum import Enum
from typing import List, Dict, Optional
from pydantic import BaseModel, Field



class Unit(Enum):
    enum_0 = "celsius"
    enum_1 = "fahrenheit"


def get_weather(city, days=3, unit="celsius"):
    """Weather of a city.

    Args:
        city: str = Field(..., description="Its name, 杭州 or Paris")
        days: Optional[int] = 3
        unit: Optional[Unit] = "celsius"
    """


def clock.read-now():
    """The time.
    """

```

# Function Call Rule and Output Format
'''
NESTED = {
    "name": "ship",
    "parameters": {
        "type": "object",
        "properties": {
            "to": {"$ref": "#/$defs/place"},
            "boxes": {"type": "array", "items": {"type": "object", "properties": {"kg": {"type": ["number", "null"]}}}},
            "labels": {"type": "object", "additionalProperties": {"type": "string"}},
            "when": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None, "pattern": "^\\d+$"},
            "other": {"type": "array"},
            "loop": {"$ref": "#/$defs/loop"},
        },
        "required": ["to"],
        "$defs": {
            "place": {
                "type": "object",
                "title": "Place",
                "properties": {"zip": {"type": "string"}},
                "required": ["zip"],
            },
            "loop": {"type": "array", "items": {"$ref": "#/$defs/loop"}},
        },
    },
}
NESTED_TEXT = '''

class To(BaseModel):
    zip: str


class Boxes(BaseModel):
    kg: Optional[Union[float, None]] = None


def ship(to, boxes=None, labels=None, when=None, other=None, loop=None):
    """

    Args:
        to: To = Field(..., title="Place")
        boxes: Optional[List[Boxes]] = None
        labels: Optional[Dict[str, str]] = None
        when: Optional[Union[str, None]] = Field(None, regex="^\\\\d+$")
        other: Optional[List[Any]] = None
'''

CALLS = [
    {
        "id": "1",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Par\\"is", "days": 2}'},
    },
    {"id": "2", "type": "function", "function": {"name": "clock.read-now", "arguments": ""}},
]
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Weather"}, {"type": "text", "text": "?"}]},
    {"role": "assistant", "content": None, "reasoning_content": "I ask.", "tool_calls": CALLS},
    {"role": "tool", "tool_call_id": "1", "content": "22 °C"},
]
PLAIN = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# One that knows of tools, as Hugging Face documents it.
WITH_TOOLS = (
    "{% for t in tools or [] %}[{{ t.type }} {{ t.function | tojson }}]{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}{{ m.thought }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}:{{ c.function.arguments | tojson }};{% endfor %}"
    "{% endfor %}"
)


def test_tools_are_described_as_in_training() -> None:
    text = tools_prompt(TOOLS)
    assert text.startswith(FUNCTIONS + "- If the user's question can be answered without calling any function")
    assert text.endswith("{answer the user's question directly or ask the user for more information}")
    assert "<|thought_end|>\n<|tool_call_start|>\n```python\nfunc1(params_name=params_value, " in text


def test_nested_schemas_and_references() -> None:
    text = tools_prompt(parse_tools([NESTED]))
    assert text.split("BaseModel, Field\n\n")[1].startswith(NESTED_TEXT)
    assert "loop: Optional[List[List[" in text  # to some depth


def test_a_template_without_tools_gets_minicpm4s_format() -> None:
    prompt = tokenizer_of("byte_level", PLAIN).render_chat(CHAT, tools=TOOLS)
    assert prompt == (
        f"<|im_start|>system\nBe brief.{tools_prompt(TOOLS)}<|im_end|>\n<|im_start|>user\nWeather?<|im_end|>\n"
        "<|im_start|>assistant\n<|thought_start|>\nI ask.\n<|thought_end|>\n<|tool_call_start|>\n```python\n"
        'get_weather(city="Par\\"is",days=2)\nclock.read-now()\n```\n<|tool_call_end|>\n<|im_end|>\n'
        "<|im_start|>tool\n22 °C<|im_end|>\n<|im_start|>assistant\n"
    )
    alone = tokenizer_of("byte_level", PLAIN).render_chat(CHAT[1:2], tools=TOOLS)
    assert alone.startswith("<|im_start|>system\n\n# Functions\n")
    without = tokenizer_of("byte_level", PLAIN).render_chat(CHAT[:1], add_generation_prompt=False)
    assert without == "<|im_start|>system\nBe brief.<|im_end|>\n"


def test_a_template_with_tools_renders_as_in_transformers() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    given = template_messages(CHAT, TOOLS, template_has_tools=True)
    expected = render_jinja_template([given], tools=[WEATHER, NOW], chat_template=WITH_TOOLS)[0][0]
    # transformers passes a tool on as it came; ours gained the schema that it lacked.
    expected = expected.replace('"The time."}', '"The time.", "parameters": {}}')
    assert tokenizer_of("byte_level", WITH_TOOLS).render_chat(CHAT, tools=TOOLS) == expected
    assert 'get_weather:{"city": "Par\\"is", "days": 2};clock.read-now:{};' in expected and "I ask." in expected
    assert CHAT[2]["tool_calls"][0]["function"]["arguments"].startswith("{")  # the request's own is as it was


WRONG = [
    ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content is of type list"),
    ([{"role": "assistant", "content": None}], "messages[0].content is of type NoneType"),
    ([{"role": "assistant", "content": None, "tool_calls": "f()"}], "messages[0].tool_calls is of type str"),
    ([{"role": "assistant", "content": None, "tool_calls": [{"function": {}}]}], "must be a function with a name"),
]


@pytest.mark.parametrize("messages, words", WRONG)
@pytest.mark.parametrize("template", [PLAIN, WITH_TOOLS])
def test_wrong_messages(messages: list[dict[str, Any]], words: str, template: str) -> None:
    with pytest.raises(UsageError) as error:
        tokenizer_of("byte_level", template).render_chat(messages)
    assert words in str(error.value)


@pytest.mark.parametrize("arguments", ["{", "[1]", "1", 7, None])
def test_arguments_that_are_no_object(arguments: Any) -> None:
    call = {"function": {"name": "f", "arguments": arguments}}
    with pytest.raises(UsageError, match="arguments must be the JSON text of an object"):
        tokenizer_of("byte_level", PLAIN).render_chat([{"role": "assistant", "content": "", "tool_calls": [call]}])
