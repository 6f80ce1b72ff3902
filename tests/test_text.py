"""Encoding, chat templates and streaming against `tokenizers`, transformers and plain definitions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from edge.errors import EdgeError, UsageError
from edge.stream import StopMatcher, TextStream, TokenDecoder
from edge.text import TextSettings, Tokenizer

CORPUS = [
    "The capital of France is Paris. The quick brown fox jumps over the lazy dog, 1234567890 times!",
    "你好，世界。今天天气很好，我们去公园散步吧。 Grüße aus Köln: naïve café, déjà vu.",
    "def main():\n    return {'answer': 42}\n\n  two  spaces   three 👍🏽 👨‍👩‍👧 🤖",
]
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_end|>", "<|im_start|>"]
CHAT = [
    {"role": "system", "content": "You are  terse.\n"},
    {"role": "user", "content": 'Say "héllo" <b>你好</b> & 🤖'},
    {"role": "assistant", "content": "<think>\nhm\n</think>\nhéllo"},
    {"role": "user", "content": "Thanks"},
]


def byte_level_model() -> tokenizers.Tokenizer:
    """GPT-2's kind, as SmolLM2's: tokens are bytes, several of them may share a character."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(CORPUS, trainer)
    model.add_tokens(["<tool>", "日本", "é!"])  # not special: they are text
    return model


def sentencepiece_model() -> tokenizers.Tokenizer:
    """Llama's and MiniCPM4's kind: tokens are text with ▁ for space, and bytes for rare characters."""
    mark = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.train_from_iterator(CORPUS[:1], trainers.BpeTrainer(vocab_size=150, show_progress=False))
    trained = json.loads(model.to_str())["model"]
    pieces = SPECIAL[:3] + [f"<0x{byte:02X}>" for byte in range(256)] + list(trained["vocab"])
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    merges = [tuple(pair) for pair in trained["merges"]]
    bpe = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    model = tokenizers.Tokenizer(bpe)
    model.normalizer = mark
    model.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    model.add_special_tokens(SPECIAL)
    model.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    return model


def metaspace_model() -> tokenizers.Tokenizer:
    model = sentencepiece_model()
    model.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return model


FAMILIES: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "byte_level": byte_level_model,
    "sentencepiece": sentencepiece_model,
    "metaspace": metaspace_model,
}


@lru_cache
def tokenizer_of(family: str, template: str | None = None, add_bos: bool = True) -> Tokenizer:
    model = FAMILIES[family]()
    return Tokenizer(model, TextSettings(add_bos, "<s>", "<|im_end|>", template), TokenDecoder.of(model))


def stream_all(stream: TextStream, ids: list[int]) -> str:
    return "".join([stream.push(i) for i in ids]) + stream.finish()


def decode_by_definition(family: str, ids: list[int]) -> str:
    """`tokenizers`' own decode, but each run of byte tokens is first put together by SentencePiece's rule."""
    model = tokenizer_of(family).model
    if family == "byte_level":
        return model.decode(ids)
    shown = [t for i in ids if (t := model.id_to_token(i)) is not None and t not in SPECIAL]
    tokens: list[str] = []
    for is_bytes, run in groupby(shown, key=lambda token: token.startswith("<0x")):
        if is_bytes:
            # surrogateescape makes exactly one character of each bad byte
            text = bytes(int(token[3:5], 16) for token in run).decode("utf-8", "surrogateescape")
            tokens.append(re.sub("[\udc80-\udcff]", "\ufffd", text))
        else:
            tokens += run
    return model.decoder.decode(tokens)


def ids_of(family: str) -> st.SearchStrategy[list[int]]:
    """Random ids with many bytes in them, characters cut in pieces, special and unknown tokens."""
    size = tokenizer_of(family).vocab_size
    anything = st.integers(0, size + 3)  # a model's head may have more rows than the tokenizer has tokens
    low = st.integers(len(SPECIAL), 260)  # the bytes
    encoded = st.text(max_size=6).map(lambda text: tokenizer_of(family).encode(text, add_bos=False))
    return st.lists(st.one_of(anything.map(lambda i: [i]), low.map(lambda i: [i]), encoded), max_size=14).map(
        lambda parts: [i for part in parts for i in part]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_text_is_the_decoded_text_at_every_prefix(family: str) -> None:
    tokenizer = tokenizer_of(family)

    @settings(max_examples=120, deadline=None)
    @given(ids_of(family))
    def check(ids: list[int]) -> None:
        whole = tokenizer.decode(ids)
        assert whole == decode_by_definition(family, ids)
        stream, emitted = TextStream(tokenizer), ""
        for count, token_id in enumerate(ids, 1):
            emitted += stream.push(token_id)
            assert whole.startswith(emitted)  # nothing is ever taken back
            prefix = tokenizer.decode(ids[:count])
            assert stream_all(TextStream(tokenizer), ids[:count]) == prefix
            # All but the one character still incomplete is out already.
            assert prefix.startswith(emitted)
            assert set(prefix[len(emitted) :]) <= {"\ufffd"} and len(prefix) - len(emitted) <= 3
        assert emitted + stream.finish() == whole

    check()


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(CORPUS))
@example(text="  two leading spaces ▁ 你 \u0000 👨‍👩‍👧")
def test_decode_of_encoded_text_equals_tokenizers(family: str, text: str) -> None:
    tokenizer = tokenizer_of(family)
    ids = tokenizer.encode(text, add_bos=True)
    assert tokenizer.decode(ids) == tokenizer.model.decode(ids) == stream_all(TextStream(tokenizer), ids)


@pytest.mark.parametrize("family", ["byte_level", "sentencepiece"])
def test_a_character_of_several_tokens_comes_out_with_its_last_byte(family: str) -> None:
    tokenizer = tokenizer_of(family)
    ids = tokenizer.encode("鱻", add_bos=False)[-3:]
    stream = TextStream(tokenizer)
    assert [stream.push(i) for i in ids] == ["", "", "鱻"]
    cut = TextStream(tokenizer)
    assert [cut.push(i) for i in ids[:2]] == ["", ""]
    assert set(cut.finish()) == {"\ufffd"}


def test_added_tokens_that_are_not_special_are_text() -> None:
    tokenizer = tokenizer_of("byte_level")
    ids = tokenizer.encode("a<tool>日本</s>", add_bos=False)
    assert tokenizer.decode(ids) == tokenizer.model.decode(ids) == "a<tool>日本"


def test_one_bad_byte_spoils_only_itself() -> None:
    tokenizer = tokenizer_of("sentencepiece")
    byte = {b: tokenizer.model.token_to_id(f"<0x{b:02X}>") for b in range(256)}
    ids = [byte[b] for b in "你".encode() + b"\xff" + "好".encode()]
    assert tokenizer.decode(ids) == "你\ufffd好"
    assert tokenizer.model.decode(ids) == "\ufffd" * 7  # what we differ from


def test_an_answer_keeps_the_space_between_it_and_its_prompt() -> None:
    for family in FAMILIES:
        tokenizer = tokenizer_of(family)
        prompt = tokenizer.encode("The capital of France is", add_bos=True)
        answer = tokenizer.encode(" Paris. " if family == "byte_level" else "Paris. ", add_bos=False)
        assert tokenizer.model.decode(prompt + answer) == "The capital of France is Paris. "
        assert stream_all(TextStream(tokenizer, after_prompt=True), answer) == " Paris. "


def stop_by_definition(text: str, stops: list[str]) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(st.text("ab你👍", max_size=4), max_size=12),
    stops=st.lists(st.text("ab你👍", min_size=1, max_size=5), max_size=4),
)
@example(pieces=["aa", "b", "aab"], stops=["aabaab", "ab"])
@example(pieces=["aabaaab", "aaac"], stops=["aabaaac"])
def test_stop_strings_end_the_text_however_it_is_cut(pieces: list[str], stops: list[str]) -> None:
    text, stopped = stop_by_definition("".join(pieces), stops)
    matcher, emitted = StopMatcher(stops), ""
    for count, piece in enumerate(pieces, 1):
        emitted += matcher.push(piece)
        assert text.startswith(emitted)
        so_far = "".join(pieces[:count])
        if matcher.stopped is None:
            # Held back is the longest end of the text that begins a stop string, and no more.
            held = so_far.removeprefix(emitted)
            ends = [so_far[i:] for i in range(len(so_far)) if any(s.startswith(so_far[i:]) for s in stops)]
            assert held == max(ends, key=len, default="")
    assert (emitted + matcher.finish(), matcher.stopped) == (text, stopped)
    assert matcher.finish() == ""


@pytest.mark.parametrize("family", ["byte_level", "sentencepiece"])
def test_stop_strings_over_tokens_and_bytes(family: str) -> None:
    tokenizer = tokenizer_of(family)
    ids = tokenizer.encode("Paris 鱻鱻! The dog", add_bos=False)
    stream = TextStream(tokenizer, ["dog", "鱻!"])
    assert stream_all(stream, ids) == "Paris 鱻"
    assert stream.stopped == "鱻!"
    unmet = TextStream(tokenizer, ["dogs", "\n\n"])
    assert stream_all(unmet, ids) == "Paris 鱻鱻! The dog"
    assert unmet.stopped is None
    with pytest.raises(UsageError, match="empty"):
        TextStream(tokenizer, ["x", ""])


TEMPLATES = {
    "smollm2": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "bos, blocks, strip": """{{ bos_token }}
  {%- for message in messages %}
    {% if message.role == 'assistant' %}
      {%- generation %}{{ message.content.split('</think>')[-1].strip() }}{{ eos_token }}{% endgeneration %}
    {% else %}
{{ message | tojson }}
    {% endif %}
  {% endfor %}
{% if tools is not none %}TOOLS{% endif %}{% if unk_token is defined %}UNK{% endif %}
""",
    "thinking, loop controls, macro": """
{%- macro turn(role, text) -%}<|im_start|>{{ role }}
{{ text }}{%- endmacro -%}
{%- set ns = namespace(count=0) -%}
{%- for m in messages -%}
  {%- if m.role == 'system' -%}{%- continue -%}{%- endif -%}
  {%- set ns.count = ns.count + 1 -%}{{ turn(m.role, m.content) ~ '<|im_end|>\n' }}
  {%- if ns.count == 2 -%}{%- break -%}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{%- endif -%}{{ {'b': 1, 'a': [true, none]} | tojson(indent=2) }}{{ strftime_now('%Y')[:2] }}""",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("family", ["byte_level", "sentencepiece"])
@pytest.mark.parametrize("options", [{}, {"enable_thinking": False}, {"enable_thinking": True}])
def test_chats_render_and_encode_as_in_transformers(name: str, family: str, options: dict[str, bool]) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = tokenizer_of(family, TEMPLATES[name], add_bos=False)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.model,
        chat_template=TEMPLATES[name],
        bos_token="<s>",
        eos_token="<|im_end|>",
    )
    for add_generation_prompt in (True, False):
        arguments: dict[str, Any] = {"add_generation_prompt": add_generation_prompt, **options}
        expected = theirs.apply_chat_template(CHAT, tokenize=False, **arguments)
        assert tokenizer.render_chat(CHAT, **arguments) == expected
        expected_ids = theirs(expected, add_special_tokens=False).input_ids
        assert tokenizer.encode_chat(CHAT, **arguments) == expected_ids


def test_a_model_without_template_speaks_minicpm4s() -> None:
    tokenizer = tokenizer_of("sentencepiece")
    messages = [{"role": "user", "content": "Hi"}]
    assert tokenizer.render_chat(messages) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.render_chat(messages, add_generation_prompt=False) == "<|im_start|>user\nHi<|im_end|>\n"
    ids = tokenizer.encode_chat(messages)
    assert [tokenizer.model.id_to_token(i) for i in ids[:2]] == ["<s>", "<|im_start|>"]
    model = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
    model.decoder = decoders.ByteLevel()
    bare = Tokenizer(model, TextSettings(False, None, None, None), TokenDecoder.of(model))
    with pytest.raises(UsageError, match=r"no chat template.*<\|im_start\|>"):
        bare.render_chat(messages)
    with pytest.raises(UsageError, match="bos_token is not set"):
        bare.encode("a", add_bos=True)


def test_bos_is_added_once_and_only_if_asked() -> None:
    with_bos = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    messages = [{"role": "user", "content": "Hi"}]
    for add_bos, template, expected in [
        (True, with_bos, 1),
        (True, with_bos.removeprefix("{{ bos_token }}"), 1),
        (False, with_bos, 1),
        (False, with_bos.removeprefix("{{ bos_token }}"), 0),
    ]:
        tokenizer = tokenizer_of("sentencepiece", template, add_bos)
        ids = tokenizer.encode_chat(messages)
        assert ids.count(tokenizer.bos_id()) == expected
    without = tokenizer.encode("Hi", add_bos=False)
    assert tokenizer.encode("Hi", add_bos=True) == [tokenizer.bos_id(), *without]


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for m in messages %}", "not Jinja .line 1"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content.nothing.at_all }}", "no attribute"),
        ("{{ messages[0]['content'] + 1 }}", 'not "int"'),
        ("{{ messages.append(1) }}", "not safely callable|unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_bad_templates_are_one_sentence(template: str, says: str) -> None:
    with pytest.raises(EdgeError, match=says) as raised:
        tokenizer_of("sentencepiece", template).render_chat([{"role": "user", "content": "x"}])
    assert not isinstance(raised.value, UsageError)


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "at least one"),
        ("Hi", "at least one"),
        ([{"role": "user", "content": "x"}, "Hi"], r"messages\[1\] must be"),
        ([{"content": "x"}], r"messages\[0\] must be"),
        ([{"role": "user"}], r"messages\[0\].content is of type NoneType"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\].content is of type list"),
    ],
)
def test_bad_messages_are_one_sentence(messages: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        tokenizer_of("sentencepiece").render_chat(messages)


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(UsageError, match="lone surrogate"):
        tokenizer_of("byte_level").encode("a\ud83d", add_bos=False)


def test_loads_from_a_folder(tmp_path: Path) -> None:
    model = sentencepiece_model()
    model.enable_truncation(4)  # some checkpoints carry it; a prompt must never be cut silently
    model.save(str(tmp_path / "tokenizer.json"))
    text_settings = TextSettings(True, "<s>", "</s>", "{{ messages[0].content }}!")
    stored = json.loads(json.dumps(text_settings.to_dict()))
    assert "chat_template" not in stored
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}!", encoding="utf-8")
    tokenizer = Tokenizer.load(tmp_path, TextSettings.from_dict(stored))
    assert tokenizer.settings == text_settings
    assert tokenizer.vocab_size == model.get_vocab_size()
    assert tokenizer.decode(tokenizer.encode(CORPUS[1], add_bos=True)) == CORPUS[1]
    assert tokenizer.render_chat([{"role": "user", "content": "Hi"}]) == "Hi!"


def test_a_damaged_folder_is_one_sentence(tmp_path: Path) -> None:
    text_settings = TextSettings(True, "<s>", None, None)
    with pytest.raises(EdgeError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path, text_settings)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(EdgeError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path, text_settings)
    model = sentencepiece_model()
    model.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UsageError, match="no '<bos>'"):
        Tokenizer.load(tmp_path, TextSettings(True, "<bos>", None, None))
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(EdgeError, match=r"chat_template\.jinja"):
        Tokenizer.load(tmp_path, text_settings)
    (tmp_path / "chat_template.jinja").unlink()
    for decoder in (decoders.WordPiece(), decoders.Sequence([decoders.Strip(" ", 1, 0), decoders.Fuse()])):
        model.decoder = decoder
        model.save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(EdgeError, match="cannot be streamed"):
            Tokenizer.load(tmp_path, text_settings)
