"""Tools as MiniCPM3 and MiniCPM4 were trained to read them: Python functions and pydantic classes, then the rules.

The text is the one of OpenBMB's chat template for tools (OpenBMB/MiniCPM, demo/minicpm3/function_call), which the
MiniCPM4 of LLaMA-Factory and MiniCPM4-MCP use too. Where that template writes no valid Python (a schema without a
type, an array without items) this writes `Any`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jinja2.filters import do_title

from edge.chat_format.call_syntax import CALLS_END, CALLS_START
from edge.chat_format.reply import THOUGHT_END, THOUGHT_START
from edge.chat_format.tools import Tool

_HEADER = """
# Functions
Here is a list of functions that you can invoke:
```python
from enum import Enum
from typing import List, Dict, Optional
from pydantic import BaseModel, Field

"""
_RULES = f"""
```

# Function Call Rule and Output Format
- If the user's question can be answered without calling any function, please answer the user's question directly. \
In this situation, you should return your thought and answer the user's question directly.
- If the user cannot be answered without calling any function, and the user does not provide enough information to \
call functions, please ask the user for more information. In this situation, you should return your thought and ask \
the user for more information.
- If the user's question cannot be answered without calling any function, and the user has provided enough information \
to call functions to solve it, you should call the functions. In this situation, the assistant should return your \
thought and call the functions.
- Use default parameters unless the user has specified otherwise.
- You should answer in the following format:

{THOUGHT_START}
{{explain why the user's question can be answered without calling a function or why you should ask the user for more \
information or why you should call one or more functions and your plan to solve the user's question.}}
{THOUGHT_END}
{CALLS_START}
```python
func1(params_name=params_value, params_name2=params_value2...)
func2(params)
```
{CALLS_END}
{{answer the user's question directly or ask the user for more information}}"""

_TYPES = {
    "string": "str",
    "number": "float",
    "integer": "int",
    "boolean": "bool",
    "null": "None",
}
_DEEPEST = 8  # of references inside references; a schema may refer to itself
Schema = Mapping[str, Any]


def tools_prompt(tools: Sequence[Tool]) -> str:
    """What follows the system message when there are tools."""
    return _HEADER + "".join(_function(tool) for tool in tools) + _RULES


def _function(tool: Tool) -> str:
    schema = _resolved(tool.parameters, tool.parameters, 0)
    properties, required = _properties(schema), _required(schema)
    arguments = [name if name in required else f"{name}={_default(spec)}" for name, spec in properties.items()]
    arguments_title = "\n\n    Args:\n" if schema else "\n"
    head = f'\n\ndef {tool.name}({", ".join(arguments)}):\n    """{tool.description}{arguments_title}'
    return "".join(_fields(schema, head, " " * 8)) + '    """\n'


def _fields(schema: Schema, head: str, indent: str) -> Iterator[str]:
    """The classes that the properties need, each before its use, then `head` and a line for each property."""
    lines, required = [head], _required(schema)
    for name, spec in _properties(schema).items():
        yield from _classes(name, spec)
        kind = _type(name, spec)
        lines.append(f"{indent}{name}: {kind if name in required else f'Optional[{kind}]'}")
        lines.append(_field(spec, is_required=name in required) + "\n")
    yield "".join(lines)


def _classes(name: str, spec: Schema) -> Iterator[str]:
    items = spec.get("items")
    if spec.get("enum"):
        options = "".join(f"    enum_{i} = {_json(option)}\n" for i, option in enumerate(spec["enum"]))
        yield f"\n\nclass {do_title(name)}(Enum):\n{options}"
    elif spec.get("type") == "object" and _properties(spec):
        yield from _fields(spec, f"\n\nclass {do_title(name)}(BaseModel):\n", " " * 4)
    elif spec.get("type") == "array" and isinstance(items, Mapping) and _properties(items):
        yield from _fields(items, f"\n\nclass {do_title(name)}(BaseModel):\n", " " * 4)


def _field(spec: Schema, *, is_required: bool) -> str:
    """A property's default and what is said of it."""
    said = {"description": spec.get("description"), "regex": spec.get("pattern"), "title": spec.get("title")}
    if not any(said.values()):
        return "" if is_required else f" = {_default(spec)}"
    words = "".join(f", {key}={_json(value)}" for key, value in said.items() if value)
    return f" = Field({'...' if is_required else _default(spec)}{words})"


def _type(name: str, spec: object) -> str:
    """The Python type of a schema; an object or an enumeration is a class named after its property."""
    if not isinstance(spec, Mapping):
        return "Any"
    kind, alternatives = spec.get("type"), spec.get("anyOf") or spec.get("oneOf")
    if spec.get("enum") or (kind == "object" and _properties(spec)):
        return str(do_title(name))
    if isinstance(kind, str) and kind in _TYPES:
        return _TYPES[kind]
    if kind == "array":
        return f"List[{_type(name, spec.get('items'))}]"
    if kind == "object":
        return f"Dict[str, {_type(name, spec.get('additionalProperties'))}]"
    if isinstance(kind, list):
        return f"Union[{', '.join(_type(name, {**spec, 'type': one}) for one in kind)}]"
    if isinstance(alternatives, list):
        return f"Union[{', '.join(_type(name, one) for one in alternatives)}]"
    return "Any"


def _default(spec: Schema) -> str:
    default = spec.get("default")
    return _json(default) if isinstance(default, str) else str(default)


def _properties(schema: Schema) -> dict[str, Schema]:
    properties = schema.get("properties")
    if not isinstance(properties, Mapping):
        return {}
    return {str(name): spec if isinstance(spec, Mapping) else {} for name, spec in properties.items()}


def _required(schema: Schema) -> tuple[str, ...]:
    required = schema.get("required")
    return tuple(required) if isinstance(required, list) else ()


def _resolved(value: Any, root: Schema, depth: int) -> Any:
    """The schema with its local references replaced by what they refer to; {} beyond a depth, or if it is nothing."""
    if isinstance(value, list):
        return [_resolved(item, root, depth) for item in value]
    if not isinstance(value, Mapping):
        return value
    reference = value.get("$ref")
    if not isinstance(reference, str):
        return {key: _resolved(item, root, depth) for key, item in value.items() if key not in ("$defs", "definitions")}
    target: Any = root
    for part in reference.removeprefix("#/").split("/"):
        target = target.get(part) if isinstance(target, Mapping) else None
    return _resolved(target, root, depth + 1) if isinstance(target, Mapping) and depth < _DEEPEST else {}


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
