"""Hugging Face checkpoints against the safetensors library's writer, and the check for finite weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from build_engine.checkpoint import open_checkpoint, require_finite
from build_engine.hf_checkpoint import parse_config
from edge.config import LongRope, ModelConfig, SparseConfig
from edge.errors import EdgeError, UsageError
from tests.synthetic import (
    CHAT_TEMPLATE,
    hf_config,
    random_weights,
    tiny_config,
    tiny_llama_config,
    write_hf_checkpoint,
)

LONG_ROPE = LongRope(tuple(1 + 0.5 * i for i in range(8)), tuple(1 + 0.7 * i for i in range(8)), 4096)
# MiniCPM4-0.5B's config.json (spec: infllmv2.md 1.1), its factor lists shortened to fit head_dim 64.
MINICPM4_05B: dict[str, Any] = {
    "architectures": ["MiniCPMForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "vocab_size": 73448,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
    "max_position_embeddings": 32768,
    "rope_scaling": {
        "rope_type": "longrope",
        "long_factor": [1.5] * 32,
        "short_factor": [1] * 32,
        "original_max_position_embeddings": 32768,
    },
    "scale_emb": 12,
    "scale_depth": 1.4,
    "dim_model_base": 256,
    "bos_token_id": 1,
    "eos_token_id": [2, 73440],
}
SOURCE = Path("config.json")


def edit_json(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({k: v for k, v in (values | changes).items() if v is not ...}))


@pytest.mark.parametrize(
    ("dtype", "stored_as", "shards"), [("bfloat16", "BF16", 1), ("float16", "F16", 3), ("float32", "F32", 2)]
)
def test_hf_tensors_are_read_only_views_of_the_files(tmp_path: Path, dtype: str, stored_as: str, shards: int) -> None:
    config = tiny_config(tie_word_embeddings=False)
    checkpoint = open_checkpoint(write_hf_checkpoint(tmp_path, config, dtype=dtype, shards=shards, seed=4))
    weights = random_weights(config, seed=4)
    assert checkpoint.config == config and checkpoint.format == "safetensors" and checkpoint.text is None
    assert set(checkpoint.tensors) == set(weights)
    for name, tensor in checkpoint.tensors.items():
        expected = weights[name].astype(tensor.dtype)
        assert (tensor.shape, tensor.stored_as, tensor.dtype.name) == (expected.shape, stored_as, dtype)
        rows = tensor.read(slice(3, 7))
        assert not rows.flags.owndata and not rows.flags.writeable
        assert np.array_equal(rows, expected[3:7]) and np.array_equal(tensor.read(slice(None)), expected)


@pytest.mark.parametrize(
    "config",
    [tiny_config(long_rope=LONG_ROPE, sparse=SparseConfig(topk=4)), tiny_llama_config(head_dim=32)],
    ids=["minicpm", "llama"],
)
def test_hf_config_round_trip(config: ModelConfig) -> None:
    assert parse_config(hf_config(config), SOURCE) == config


def test_minicpm4_05b_config() -> None:
    config = parse_config(MINICPM4_05B, SOURCE, more_eos=(73440, 7))
    assert config == ModelConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=73448,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        scale_emb=12.0,
        scale_depth=1.4,
        dim_model_base=256.0,
        bos_token_id=1,
        eos_token_ids=(2, 73440, 7),
        long_rope=LongRope((1,) * 32, (1.5,) * 32, 32768),
    )


def test_config_defaults_are_the_classes() -> None:
    minicpm = parse_config({"model_type": "minicpm"}, SOURCE)
    llama = parse_config({"model_type": "llama", "rope_parameters": {"rope_theta": 5e5}}, SOURCE)
    assert (minicpm.hidden_size, minicpm.head_dim, minicpm.max_position_embeddings) == (4096, 128, 2048)
    assert minicpm.tie_word_embeddings and (minicpm.scale_emb, minicpm.dim_model_base) == (1, 1)
    assert not llama.tie_word_embeddings and (llama.residual_scale, llama.logit_divisor) == (1, 1)
    assert llama.rope_theta == 5e5 and llama.eos_token_ids == (2,)


ROPE = MINICPM4_05B["rope_scaling"]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"hidden_size": "1024"}, "hidden_size is '1024' but must be an integer"),
        ({"hidden_size": True}, "hidden_size is True but must be an integer"),
        ({"hidden_size": 1000}, "hidden_size 1000, num_attention_heads 16"),
        ({"num_attention_heads": 0}, "num_attention_heads 0"),
        ({"num_key_value_heads": 3}, "16 attention heads cannot share 3"),
        ({"intermediate_size": -1}, "intermediate_size is -1 but must be positive"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"vocab_size": 10**4000}, "vocab_size is 1000"),
        ({"head_dim": 63}, "head_dim is 63"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"model_type": "qwen2"}, "model_type is qwen2; supported are minicpm .* and llama"),
        ({"architectures": [{}]}, "model_type is absent"),
        ({"model_type": "llama"}, "rope type longrope is not supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope type yarn"),
        ({"rope_scaling": ROPE | {"long_factor": [1.0] * 31}}, "long_factor has 31 entries .* needs 32"),
        ({"rope_scaling": ROPE | {"short_factor": [1.0] * 31 + ["x"]}}, "short_factor has an entry"),
        ({"rope_scaling": ROPE | {"short_factor": [0] * 32}}, "short_factor has an entry"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "short_factor is missing"),
        ({"sparse_config": {"top_k": 64}}, "sparse_config has no field top_k"),
        ({"sparse_config": {"topk": 0}}, "topk is 0 but must be at least 1"),
        ({"sparse_config": {"window_size": 100}}, "window_size 100 must be a multiple of block_size 64"),
        ({"eos_token_id": [2, "x"]}, "eos_token_id"),
        ({"eos_token_id": 73448}, "73448 is outside the 73448 tokens"),
    ],
)
def test_bad_config_is_one_sentence(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(EdgeError, match=complaint) as error:
        parse_config(MINICPM4_05B | changes, SOURCE)
    assert "\n" not in str(error.value)


def rewrite(folder: Path, edit: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


BIAS = {"model.layers.0.self_attn.q_proj.bias": np.zeros(64, np.float32)}
GPTQ = {"model.layers.0.self_attn.q_proj.qweight": np.zeros((8, 64), np.int32)}
NORM = "model.layers.1.post_attention_layernorm.weight"


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (lambda t: t.pop(NORM), f"tensor {NORM} is missing"),
        (lambda t: t.update({NORM: np.ones(63, np.float32)}), rf"{NORM} has shape \[63\].* asks for \[64\]"),
        (lambda t: t.update({NORM: np.ones(64)}), f"{NORM} is stored as F64; supported are BF16, F16, F32"),
        (lambda t: t.update(BIAS), "q_proj.bias has no place"),
        (lambda t: t.update(GPTQ), "q_proj.qweight is GPTQ or AWQ int4"),
        (lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}), "lm_head.* differs"),
    ],
)
def test_hf_tensors_must_be_the_models(tmp_path: Path, edit: Any, complaint: str) -> None:
    write_hf_checkpoint(tmp_path, tiny_config(), dtype="float32")
    rewrite(tmp_path, edit)
    with pytest.raises(EdgeError, match=complaint):
        open_checkpoint(tmp_path)


def test_redundant_tensors_are_ignored(tmp_path: Path) -> None:
    write_hf_checkpoint(tmp_path, tiny_config(), dtype="float32")
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    rewrite(tmp_path, lambda t: t.update(buffer | {"lm_head.weight": t["model.embed_tokens.weight"]}))
    assert set(open_checkpoint(tmp_path).tensors) == set(random_weights(tiny_config()))


def test_hf_folder_without_its_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no config\.json"):
        open_checkpoint(tmp_path)
    with pytest.raises(UsageError, match="does not exist"):
        open_checkpoint(tmp_path / "absent")
    write_hf_checkpoint(tmp_path, tiny_config(), shards=2)
    with pytest.raises(UsageError, match=r"not a \.gguf file"):
        open_checkpoint(tmp_path / "config.json")
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(EdgeError, match=r"is in model-00002-of-00002\.safetensors, which is not in"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(EdgeError, match=r"has no model\.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(EdgeError, match="convert them to safetensors"):
        open_checkpoint(tmp_path)


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_checkpoint(tmp_path_factory.mktemp("hf"), tiny_config(), tokenizer=True)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_truncated_safetensors_name_the_file(hf_folder: Path, data: st.DataObject) -> None:
    path = hf_folder / "model.safetensors"
    whole = path.read_bytes()
    header_end = 8 + int.from_bytes(whole[:8], "little")
    length = data.draw(st.one_of(st.integers(0, header_end), st.integers(0, len(whole) - 1)))
    try:
        path.write_bytes(whole[:length])
        with pytest.raises(EdgeError, match=re.escape(str(path))):
            open_checkpoint(hf_folder)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ({"data_offsets": [0, 128]}, "overlap"),
        ({"data_offsets": [0, 126]}, r"shape \[64\] in BF16 needs 128 bytes but has 126"),
        ({"data_offsets": [10**9, 10**9 + 128]}, "ends .* bytes after the end of the file"),
        ({"data_offsets": [128, 0]}, "header entry of tensor .* is damaged"),
        ({"data_offsets": None}, "header entry of tensor .* is damaged"),
        ({"shape": [-64]}, "header entry of tensor .* is damaged"),
        ({"dtype": []}, "header entry of tensor .* is damaged"),
    ],
)
def test_safetensors_header_is_checked(tmp_path: Path, entry: dict[str, Any], complaint: str) -> None:
    path = write_hf_checkpoint(tmp_path, tiny_config()) / "model.safetensors"
    whole = path.read_bytes()
    header_end = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:header_end])
    assert header[NORM]["data_offsets"][0] != 0
    header[NORM] |= entry
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[header_end:])
    with pytest.raises(EdgeError, match=complaint):
        open_checkpoint(tmp_path)


def test_hf_text_assets(tmp_path: Path) -> None:
    text = open_checkpoint(write_hf_checkpoint(tmp_path, tiny_config(), tokenizer=True)).text
    assert text is not None
    assert (text.add_bos, text.bos_token, text.eos_token) == (True, "<s>", "<|im_end|>")
    assert text.chat_template == CHAT_TEMPLATE
    tokenizer = Tokenizer.from_str(text.tokenizer_json)
    ids = tokenizer.encode("the fox<|im_end|>").ids
    assert ids[0] == 1 and ids[-1] == 4 and tokenizer.decode(ids) == "the fox"

    settings_path = tmp_path / "tokenizer_config.json"
    templates = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    edit_json(settings_path, add_bos_token=False, bos_token=..., chat_template=templates)
    edit_json(tmp_path / "generation_config.json", temperature=0.8, top_p=0.9, eos_token_id=[2, 3], pad=2)
    checkpoint = open_checkpoint(tmp_path)
    text = checkpoint.text
    assert text is not None and not text.add_bos and text.bos_token == "<s>" and text.chat_template == "d"
    assert Tokenizer.from_str(text.tokenizer_json).encode("the fox").ids == ids[1:-1]
    assert checkpoint.generation == {"temperature": 0.8, "top_p": 0.9}
    assert checkpoint.config.eos_token_ids == (2, 4, 3)

    (tmp_path / "chat_template.jinja").write_text("from the file")
    edit_json(settings_path, add_bos_token=True, bos_token={"content": "</s>"})
    text = open_checkpoint(tmp_path).text
    assert text is not None and text.chat_template == "from the file"
    assert Tokenizer.from_str(text.tokenizer_json).encode("the fox").ids == [2, *ids[1:-1]]


@settings(max_examples=100, deadline=None)
@given(data=st.data(), dtype=st.sampled_from([ml_dtypes.bfloat16, np.float16, np.float32]))
def test_require_finite_agrees_with_isfinite(data: st.DataObject, dtype: Any) -> None:
    width = np.dtype(dtype).itemsize
    largest = ml_dtypes.finfo(dtype).max
    edges = [np.array(x, dtype).tobytes() for x in (largest, -largest, np.inf, -np.inf, np.nan, 0.0, -0.0)]
    patterns = st.one_of(st.sampled_from(edges), st.binary(min_size=width, max_size=width))
    drawn = data.draw(st.lists(patterns, min_size=6, max_size=6))
    array = np.frombuffer(b"".join(drawn), dtype).reshape(3, 2)
    bad = np.argwhere(~np.isfinite(array))
    if len(bad) == 0:
        require_finite("w", array)
    else:
        row, column = bad[0]
        with pytest.raises(EdgeError, match=f"tensor w holds .* at row {row + 7}, column {column};"):
            require_finite("w", array, first_row=7)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_require_finite_at_the_edge(dtype: Any) -> None:
    largest = ml_dtypes.finfo(dtype).max
    require_finite("w", np.array([largest, -largest], dtype))
    for value in (np.inf, -np.inf, np.nan, -np.nan):
        with pytest.raises(EdgeError, match="at row 1;"):
            require_finite("w", np.array([-largest, value], dtype))
