"""Text in, token ids out: the tokenizer of a bundle and its chat template, with the rules of Hugging Face."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import tokenizers

from edge.bundle import CHAT_TEMPLATE, TOKENIZER
from edge.chat_format.messages import template_messages
from edge.chat_format.tools import Tool
from edge.errors import EdgeError, UsageError
from edge.stream import Detokenizer, TokenDecoder

MOST_CHARACTERS = 16  # of a token, on average over any text: more than there are

# MiniCPM4's own template (spec: infllmv2.md 7), for a checkpoint that ships none.
MINICPM4_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class TextSettings:
    """What the checkpoint's tokenizer_config.json adds to tokenizer.json."""

    add_bos: bool
    bos_token: str | None
    eos_token: str | None
    chat_template: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values for the manifest, without the template, which is the file CHAT_TEMPLATE."""
        values = asdict(self)
        del values["chat_template"]
        return values

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> TextSettings:
        """Rebuild from `to_dict`; `Tokenizer.load` finds the template."""
        return TextSettings(**{"chat_template": None, **values})


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back. Make it with `Tokenizer.load`.

    As in Hugging Face, special tokens written out in a text become those tokens, in raw prompts and in the
    content of chat messages alike: text of strangers must go through `without_special_tokens` first.
    """

    model: tokenizers.Tokenizer
    settings: TextSettings
    decoder: TokenDecoder

    @staticmethod
    def load(folder: Path, settings: TextSettings) -> Tokenizer:
        """Read `folder`/tokenizer.json, and `folder`/chat_template.jinja unless `settings` hold a template.

        EdgeError if a file cannot be read, the decoder is of an unknown kind, or the BOS token is missing.
        """
        path = folder / TOKENIZER
        try:
            model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception for a missing or damaged file
            raise EdgeError(f"{path} is no valid tokenizer ({error}): export the bundle again") from error
        model.no_truncation()
        model.no_padding()
        if settings.chat_template is None and (folder / CHAT_TEMPLATE).exists():
            settings = replace(settings, chat_template=_read_template(folder / CHAT_TEMPLATE))
        tokenizer = Tokenizer(model, settings, TokenDecoder.of(model))
        if settings.add_bos:
            tokenizer.bos_id()
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """Tokens of the tokenizer, added ones included; a model's logits may have a few more rows."""
        return self.model.get_vocab_size()

    def bos_id(self) -> int:
        """Id of the BOS token; UsageError if there is none."""
        token = self.settings.bos_token
        token_id = None if token is None else self.model.token_to_id(token)
        if token_id is None:
            problem = "bos_token is not set" if token is None else f"the vocabulary has no {token!r}"
            raise UsageError(f"a BOS token is to be added but {problem}: correct bos_token or unset add_bos")
        return token_id

    def encode(self, text: str, *, add_bos: bool) -> list[int]:
        """Ids of `text`, after the BOS token if `add_bos` and the text does not begin with it already."""
        try:
            ids = self.model.encode(text, add_special_tokens=False).ids
        except TypeError as error:
            raise UsageError(
                "the text holds a lone surrogate (U+D800 to U+DFFF), which is no character: send Unicode"
            ) from error
        if add_bos and ids[:1] != [bos := self.bos_id()]:
            return [bos, *ids]
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a whole prompt, after the BOS token if the settings add one."""
        return self.encode(text, add_bos=self.settings.add_bos)

    def token_starts(self, text: str) -> list[int]:
        """The character of `text` at which each of its tokens begins."""
        return [start for start, _ in self.model.encode(text, add_special_tokens=False).offsets]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, without special tokens; bytes that are no UTF-8 become U+FFFD.

        As `tokenizers` decodes, but for one thing: in a run of byte tokens, a bad byte spoils only itself
        (SentencePiece's rule) and not the whole run, so that text once streamed is never taken back.
        """
        detokenizer = Detokenizer(self.decoder)
        pieces = [detokenizer.push(token_id) for token_id in ids]
        return "".join(pieces) + detokenizer.finish()

    def without_special_tokens(self, text: str) -> str:
        """Text of strangers with a space in whatever would become a special token, so that it stays text."""
        for token in self.decoder.special_texts:
            text = text.replace(token, f"{token[:1]} {token[1:]}")
        return text

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Tool] = (),
        add_generation_prompt: bool = True,
        enable_thinking: bool | None = None,
    ) -> str:
        """The prompt of a chat by the checkpoint's template; `enable_thinking` None leaves that to it.

        Messages are those of the OpenAI protocol, with calls of tools and their results. A template that does not know
        of tools gets them in MiniCPM4's own format (edge/chat_format).
        UsageError for malformed messages or a model without a template, EdgeError if the template fails.
        """
        source = self._chat_template()
        messages = template_messages(messages, tools, template_has_tools="tools" in _variables(source))
        variables = {
            "bos_token": self.settings.bos_token,
            "eos_token": self.settings.eos_token,
            "enable_thinking": enable_thinking,
        }
        template = _compile(source)
        try:
            return template.render(
                messages=messages,
                tools=[tool.to_openai() for tool in tools] or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                # What is not set must be undefined to the template, as it is in Hugging Face.
                **{name: value for name, value in variables.items() if value is not None},
            )
        except Exception as error:  # the template is the checkpoint's code: anything may go wrong in it
            raise EdgeError(
                f"the chat template does not take these messages ({error}): change their roles or contents, "
                f"or correct {CHAT_TEMPLATE}"
            ) from error

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Tool] = (),
        add_generation_prompt: bool = True,
        enable_thinking: bool | None = None,
    ) -> list[int]:
        """Ids of `render_chat`, with the BOS token if the settings add one and the template wrote none."""
        text = self.render_chat(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, enable_thinking=enable_thinking
        )
        return self.encode_prompt(text)

    def may_think(self, enable_thinking: bool | None) -> bool:
        """Whether the template has a thinking mode that is not switched off."""
        return enable_thinking is not False and "enable_thinking" in _variables(self._chat_template())

    def _chat_template(self) -> str:
        if self.settings.chat_template is not None:
            return self.settings.chat_template
        if all(self.model.token_to_id(token) is not None for token in ("<|im_start|>", "<|im_end|>")):
            return MINICPM4_TEMPLATE
        raise UsageError(
            "the model has no chat template, and lacks the tokens <|im_start|> and <|im_end|> of MiniCPM4's: "
            f"put a template into the bundle as {CHAT_TEMPLATE}, or send a raw prompt"
        )


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EdgeError(f"{path} cannot be read ({error}): export the bundle again") from error


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks what the model wrote, for training; here the block is just its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which a model was not trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    """Hugging Face's environment: sandboxed, for templates come with checkpoints from anywhere."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


@lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
    try:
        return _environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise EdgeError(
            f"the chat template is not Jinja (line {error.lineno}: {error.message}): correct {CHAT_TEMPLATE}"
        ) from error


@lru_cache(maxsize=8)
def _variables(source: str) -> set[str]:
    """What a template reads of what it is given."""
    _compile(source)
    return jinja2.meta.find_undeclared_variables(_environment().parse(source))
