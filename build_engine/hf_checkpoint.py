"""Hugging Face folders: config.json, memory-mapped safetensors shards, tokenizer files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from build_engine.checkpoint import (
    Checkpoint,
    LazyTensor,
    TextAssets,
    expected_shapes,
    select_tensors,
    validate_config,
    with_bos,
)
from build_engine.gptq_checkpoint import GROUP_SIZES, STORED_ZEROS, GptqFormat, open_gptq_tensors
from build_engine.safetensors_file import INTEGER_SUFFIXES, parse_json_object, read_safetensors
from edge.config import LongRope, ModelConfig, SparseConfig, neutral_mup
from edge.errors import EdgeError

_MODEL_TYPES = {"MiniCPMForCausalLM": "minicpm", "LlamaForCausalLM": "llama"}
# OpenBMB's *-marlin-cpmcu folders; CPM.cu, too, prefers the first where several files lie (spec:
# quantization_and_speculation.md 3.2).
_MARLIN_FILES = ("model_gptq_marlin.safetensors", "model_gptq.safetensors")
INTEGER = ((int,), "an integer")
NUMBER = ((int, float), "a number")
FLAG = ((bool,), "true or false")
OBJECT = ((dict,), "an object")
LIST = ((list,), "a list")
STRING = ((str,), "a string")
_SAMPLING_FIELDS = {
    "do_sample": FLAG,
    "temperature": NUMBER,
    "top_p": NUMBER,
    "top_k": INTEGER,
    "min_p": NUMBER,
    "repetition_penalty": NUMBER,
}


def open_hf(folder: Path) -> Checkpoint:
    """Open a folder that holds config.json; EdgeError names the file and field or tensor at fault."""
    config_path = folder / "config.json"
    values = read_json(config_path)
    generation_path = folder / "generation_config.json"
    generation = read_json(generation_path) if generation_path.is_file() else {}
    config = parse_config(values, config_path, _token_ids(generation, generation_path))
    gptq = gptq_format(values, config_path)
    found = open_shards(folder, gptq)
    if gptq is not None:
        found = open_gptq_tensors(found, gptq, dict(expected_shapes(config)), folder)
    spare_head = found.pop("lm_head.weight", None) if config.tie_word_embeddings else None
    tensors = select_tensors(found, config, folder)
    if spare_head is not None:
        _require_same(spare_head, tensors["model.embed_tokens.weight"], folder)
    return Checkpoint(
        path=folder,
        format="safetensors",
        config=config,
        tensors=tensors,
        text=_read_text(folder, config),
        generation={
            key: json_field(generation, key, kind, None, generation_path)
            for key, kind in _SAMPLING_FIELDS.items()
            if generation.get(key) is not None
        },
    )


def parse_config(values: dict[str, Any], source: Path, more_eos: tuple[int, ...] = ()) -> ModelConfig:
    """ModelConfig from config.json's `values`, missing ones by the class's default (spec: infllmv2.md 1.1).

    `more_eos`: the stop tokens of generation_config.json, which `generate` obeys beside the model's own.
    """
    model_type = _model_type(values, source)
    refuse_unsupported(values, source)

    def integer(key: str, default: int) -> int:
        return int(json_field(values, key, INTEGER, default, source))

    def number(key: str, default: float) -> float:
        return float(json_field(values, key, NUMBER, default, source))

    hidden, heads = integer("hidden_size", 4096), integer("num_attention_heads", 32)
    layers = integer("num_hidden_layers", 32)
    if min(hidden, heads, layers) < 1 or (values.get("head_dim") is None and hidden % heads):
        raise EdgeError(
            f"{source}: hidden_size {hidden}, num_attention_heads {heads} and num_hidden_layers {layers} "
            "must be positive, and without head_dim the first a multiple of the second"
        )
    rope = json_field(values, "rope_scaling", OBJECT, values.get("rope_parameters") or {}, source)
    theta = number("rope_theta", json_field(rope, "rope_theta", NUMBER, 10000.0, source))
    mup = {key: number(key, 1.0) for key in ("scale_emb", "scale_depth", "dim_model_base")}
    bos = None if values.get("bos_token_id", 1) is None else integer("bos_token_id", 1)
    eos = _token_ids({"eos_token_id": 2} | values, source)
    config = ModelConfig(
        hidden_size=hidden,
        intermediate_size=integer("intermediate_size", 11008),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=integer("num_key_value_heads", heads),
        head_dim=integer("head_dim", hidden // heads),
        vocab_size=integer("vocab_size", 32000),
        rms_norm_eps=number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        max_position_embeddings=integer("max_position_embeddings", 2048),
        tie_word_embeddings=json_field(values, "tie_word_embeddings", FLAG, model_type == "minicpm", source),
        bos_token_id=bos,
        eos_token_ids=tuple(dict.fromkeys((*eos, *more_eos))),
        long_rope=_long_rope(rope, model_type, source),
        sparse=_sparse(values, source),
        **(mup if model_type == "minicpm" else neutral_mup(layers, hidden)),
    )
    validate_config(config, source)
    return config


def _model_type(values: dict[str, Any], source: Path) -> str:
    architectures = json_field(values, "architectures", LIST, [], source)
    by_architecture = next((kind for name, kind in _MODEL_TYPES.items() if name in architectures), "absent")
    model_type = str(json_field(values, "model_type", STRING, by_architecture, source))
    if model_type not in _MODEL_TYPES.values():
        raise EdgeError(
            f"{source}: model_type is {model_type}; supported are minicpm (MiniCPM4, MiniCPM4.1, BitCPM4) and llama"
        )
    return model_type


def refuse_unsupported(values: dict[str, Any], source: Path) -> None:
    """EdgeError if config.json asks for biases or another activation than SwiGLU's."""
    for key in ("attention_bias", "mlp_bias"):
        if json_field(values, key, FLAG, False, source):
            raise EdgeError(f"{source}: {key} is true, but only linear layers without bias are supported")
    activation = json_field(values, "hidden_act", STRING, "silu", source)
    if activation != "silu":
        raise EdgeError(f"{source}: hidden_act is {activation}, but only silu is supported")


def gptq_format(values: dict[str, Any], source: Path) -> GptqFormat | None:
    """quantization_config, None without one; EdgeError names the method or setting that is not read.

    A field that is absent has the value of symmetric GPTQ: CPM.cu asks Marlin's files for group_size alone.
    """
    given = json_field(values, "quantization_config", OBJECT, {}, source)
    if not given:
        return None
    method = json_field(given, "quant_method", STRING, "gptq", source)
    if method != "gptq":
        raise EdgeError(
            f"{source}: the weights are quantised with {method}, which is not supported (gptq is); "
            "use the bf16 checkpoint, a GPTQ one or a GGUF file"
        )
    if not json_field(given, "sym", FLAG, True, source):
        raise EdgeError(f"{source}: sym is false, but asymmetric int4 is not supported; use the bf16 checkpoint")
    limits = {
        "bits": (INTEGER, 4, (4,)),
        "group_size": (INTEGER, None, GROUP_SIZES),
        "checkpoint_format": (STRING, "gptq", tuple(STORED_ZEROS)),
    }
    said = {key: json_field(given, key, kind, default, source) for key, (kind, default, _) in limits.items()}
    for key, (_, _, supported) in limits.items():
        if said[key] not in supported:
            raise EdgeError(
                f"{source}: {key} is {said[key]}, but of GPTQ weights only {', '.join(map(str, supported))} can be "
                "read; use the bf16 checkpoint or another GPTQ one"
            )
    return GptqFormat(
        group_size=said["group_size"],
        stored_zero=STORED_ZEROS[said["checkpoint_format"]],
        desc_act=json_field(given, "desc_act", FLAG, False, source),
        lm_head=json_field(given, "lm_head", FLAG, False, source),
    )


def _long_rope(rope: dict[str, Any], model_type: str, source: Path) -> LongRope | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "longrope" or model_type != "minicpm":
        allowed = "longrope or none" if model_type == "minicpm" else "none"
        raise EdgeError(f"{source}: rope type {kind} is not supported; {model_type} may have {allowed}")
    factors = {}
    for key in ("short_factor", "long_factor"):
        factors[key] = tuple(json_field(rope, key, LIST, None, source))
        if not all(_is_a(factor, (int, float)) for factor in factors[key]):
            raise EdgeError(f"{source}: rope {key} has an entry that is not a number")
    original = json_field(rope, "original_max_position_embeddings", INTEGER, None, source)
    return LongRope(factors["short_factor"], factors["long_factor"], original)


def _sparse(values: dict[str, Any], source: Path) -> SparseConfig | None:
    given = json_field(values, "sparse_config", OBJECT, {}, source)
    if not given:
        return None
    defaults = vars(SparseConfig())
    unknown = [key for key in given if key not in defaults]
    if unknown:
        raise EdgeError(f"{source}: sparse_config has no field {unknown[0]}; known are {', '.join(defaults)}")
    sparse = SparseConfig(
        **{
            key: json_field(given, key, FLAG if isinstance(default, bool) else INTEGER, default, source)
            for key, default in defaults.items()
        }
    )
    if (problem := sparse.problem()) is not None:
        raise EdgeError(f"{source}: sparse_config {problem}")
    return sparse


def open_shards(folder: Path, gptq: GptqFormat | None) -> dict[str, LazyTensor]:
    """All tensors of the folder's safetensors; EdgeError if there are none, or int4 ones without `gptq`."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    repacked = [folder / name for name in _MARLIN_FILES if (folder / name).is_file()]
    if gptq is not None and repacked:
        tensors = read_safetensors(repacked[0])
    elif single.is_file():
        tensors = read_safetensors(single)
    elif index.is_file():
        tensors = _open_index(folder, index)
    elif any(folder.glob("pytorch_model*.bin")):
        raise EdgeError(
            f"{folder} holds only pytorch_model.bin weights, which can run code when read; convert them to "
            "safetensors with transformers' save_pretrained"
        )
    else:
        raise EdgeError(f"{folder} has no model.safetensors or model.safetensors.index.json; download it")
    int4 = next((name for name in tensors if name.endswith(INTEGER_SUFFIXES)), None)
    if gptq is None and int4 is not None:
        raise EdgeError(
            f"{folder}: tensor {int4} is GPTQ or AWQ int4, but config.json has no quantization_config; "
            "download both again"
        )
    # Old exports keep the rotary buffer, which is recomputed from the configuration.
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}


def _open_index(folder: Path, index: Path) -> dict[str, LazyTensor]:
    weight_map = json_field(read_json(index), "weight_map", OBJECT, None, index)
    shards: dict[str, dict[str, LazyTensor]] = {}
    tensors = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not (folder / shard).is_file():
            raise EdgeError(f"{index}: tensor {name} is in {shard}, which is not in the folder; download it")
        if shard not in shards:
            shards[shard] = read_safetensors(folder / shard)
        if name not in shards[shard]:
            raise EdgeError(f"{index}: tensor {name} should be in {shard} but is not; download both again")
        tensors[name] = shards[shard][name]
    return tensors


def _require_same(head: LazyTensor, embedding: LazyTensor, folder: Path) -> None:
    """A tied model's lm_head is redundant; if it differs, versions of transformers disagree on which wins."""
    step = 4096
    if (head.shape, head.dtype) != (embedding.shape, embedding.dtype) or not all(
        np.array_equal(head.read(rows).view(np.uint8), embedding.read(rows).view(np.uint8))
        for rows in (slice(start, start + step) for start in range(0, head.shape[0], step))
    ):
        raise EdgeError(
            f"{folder}: tie_word_embeddings is true (or absent), yet lm_head.weight differs from "
            "model.embed_tokens.weight; set tie_word_embeddings to false in config.json to use both"
        )


def _read_text(folder: Path, config: ModelConfig) -> TextAssets | None:
    path, settings_path = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not path.is_file():
        return None
    settings = read_json(settings_path) if settings_path.is_file() else {}
    try:
        tokenizer = Tokenizer.from_str(_read_utf8(path))
    except Exception as error:  # the library raises nothing narrower
        raise EdgeError(f"{path} is not a tokenizer the tokenizers library reads: {error}") from error
    eos_id = config.eos_token_ids[0] if config.eos_token_ids else None
    bos = _special_token(settings, "bos_token", config.bos_token_id, tokenizer, settings_path)
    eos = _special_token(settings, "eos_token", eos_id, tokenizer, settings_path)
    starts_with_bos = bos is not None and tokenizer.encode("").ids[:1] == [tokenizer.token_to_id(bos)]
    add_bos = json_field(settings, "add_bos_token", FLAG, starts_with_bos, settings_path)
    if add_bos and (bos is None or tokenizer.token_to_id(bos) is None):
        raise EdgeError(f"{settings_path}: add_bos_token is true but bos_token {bos} is not in {path.name}")
    tokenizer_json = with_bos(tokenizer, bos if add_bos else None).to_str()
    return TextAssets(tokenizer_json, _chat_template(settings, folder), add_bos, bos, eos)


def _chat_template(settings: dict[str, Any], folder: Path) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _read_utf8(path)
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        source = folder / "tokenizer_config.json"
        raise EdgeError(f"{source}: chat_template must be a string or a list of named strings")
    return template


def _special_token(
    settings: dict[str, Any], key: str, token_id: int | None, tokenizer: Tokenizer, source: Path
) -> str | None:
    token = settings.get(key)
    if isinstance(token, dict):
        token = token.get("content")
    if token is None:
        return None if token_id is None else tokenizer.id_to_token(token_id)
    return str(json_field({key: token}, key, STRING, None, source))


def _token_ids(values: dict[str, Any], source: Path) -> tuple[int, ...]:
    given = values.get("eos_token_id")
    ids = tuple(given) if isinstance(given, list) else (given,) if given is not None else ()
    if not all(_is_a(token, (int,)) for token in ids):
        raise EdgeError(f"{source}: eos_token_id is {given!r} but must be an integer or a list of integers")
    return ids


def _is_a(value: Any, types: tuple[type, ...]) -> bool:
    if isinstance(value, bool):
        return bool in types
    return isinstance(value, types) and not (isinstance(value, int) and value.bit_length() > 63)


def json_field(values: dict[str, Any], key: str, kind: tuple[tuple[type, ...], str], default: Any, source: Path) -> Any:
    """`values[key]` if of the right kind, `default` if absent or null; EdgeError otherwise."""
    types, wanted = kind
    value = default if values.get(key) is None else values[key]
    if not _is_a(value, types):
        given = "missing" if value is None else f"{value!r:.60}"
        raise EdgeError(f"{source}: {key} is {given} but must be {wanted}")
    return value


def _read_utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise EdgeError(f"{path} is damaged: it is not UTF-8 text ({error})") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    return parse_json_object(path.read_bytes(), path)
