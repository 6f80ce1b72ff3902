"""Every published layout of a draft is read, and what does not fit its base is refused in a sentence."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from build_engine.checkpoint import Checkpoint, open_checkpoint
from build_engine.draft_checkpoint import open_draft, with_base
from edge.config import neutral_mup
from edge.errors import EdgeError, UsageError
from tests.draft_samples import draft_config, draft_weights, write_draft, write_int4_draft
from tests.gptq_samples import write_gptq_folder
from tests.synthetic import tiny_config, tiny_llama_config, write_gguf_checkpoint, write_hf_checkpoint

BASE = tiny_config()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(write_hf_checkpoint(tmp_path_factory.mktemp("base") / "base", BASE))


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "draft.pt"])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_published_folders_are_read(file: str, dtype: Any, base: Checkpoint, tmp_path: Path) -> None:
    config = draft_config(BASE)
    stored = write_draft(tmp_path, config, draft_weights(config), file=file, dtype=dtype)
    torch.save([1, 2], tmp_path / "freq_2.pt")  # lies in the published folders, and holds no weights
    draft = open_draft(tmp_path, base)
    assert set(draft.tensors) == set(stored)
    for name, values in stored.items():
        assert draft.tensors[name].dtype == dtype
        assert np.array_equal(draft.tensors[name].read(slice(None)).astype(np.float32), values)
    found = draft.config
    assert (found.intermediate_size, found.num_attention_heads, found.num_key_value_heads) == (96, 2, 1)
    assert found.residual_scale == pytest.approx(BASE.scale_depth / 3**0.5)
    assert found.logit_scale == pytest.approx(BASE.dim_model_base / BASE.hidden_size)
    assert found.has_input_norms and found.has_attention_norm and found.vocab_size is None


@pytest.mark.parametrize(("marlin", "group"), [(False, 32), (False, -1), (True, 64), (True, -1)])
def test_int4_folders_keep_their_codes(marlin: bool, group: int, tmp_path: Path) -> None:
    big = tiny_config(hidden_size=128, num_attention_heads=8)
    checkpoint = open_checkpoint(write_hf_checkpoint(tmp_path / "base", big))
    config = draft_config(big, intermediate_size=256, num_attention_heads=8, num_key_value_heads=4)
    values, layers = write_int4_draft(tmp_path / "draft", config, draft_weights(config), group, marlin=marlin)
    draft = open_draft(tmp_path / "draft", checkpoint)
    assert set(draft.tensors) == set(values)
    for name, tensor in draft.tensors.items():
        assert np.array_equal(tensor.read(slice(None)).astype(np.float32), values[name]), name
    codes = draft.tensors["fc.weight"].codes
    assert codes is not None and codes.group == (256 if group == -1 else group)
    assert np.array_equal(codes.read(slice(3, 9))[0], layers["fc"].codes[3:9])


def test_names_may_begin_with_model(base: Checkpoint, tmp_path: Path) -> None:
    config = draft_config(BASE)
    write_draft(tmp_path, config, {f"model.{name}": array for name, array in draft_weights(config).items()})
    assert "fc.weight" in open_draft(tmp_path, base).tensors


def test_a_bias_of_zeros_is_none(base: Checkpoint, tmp_path: Path) -> None:
    config = draft_config(BASE)
    write_draft(tmp_path, config, {**draft_weights(config), "fc.bias": np.zeros(64, np.float32)})
    assert "fc.bias" not in open_draft(tmp_path, base).tensors
    write_draft(tmp_path, config, {**draft_weights(config), "fc.bias": np.ones(64, np.float32)})
    with pytest.raises(EdgeError, match=r"fc\.bias is not zero"):
        open_draft(tmp_path, base)


def test_norms_that_are_missing_are_not_used(base: Checkpoint, tmp_path: Path) -> None:
    config = draft_config(BASE)
    write_draft(tmp_path, config, draft_weights(config, norms=False, attention_norm=False))
    found = open_draft(tmp_path, base).config
    assert not found.has_input_norms and not found.has_attention_norm
    weights = draft_weights(config)
    del weights["input_norm2.weight"]
    write_draft(tmp_path, config, weights)
    with pytest.raises(EdgeError, match=r"input_norm1\.weight is there, but input_norm2\.weight is not"):
        open_draft(tmp_path, base)


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size": 32}, r"hidden_size is 32, but the base model's is 64"),
    ({"head_dim": 32}, r"head_dim is 32, but the base model's is 16"),
    ({"num_hidden_layers": 2}, r"num_hidden_layers is 2, but an EAGLE draft has one"),
    ({"num_attention_heads": 3, "num_key_value_heads": 2}, r"3 attention heads, 2 key-value heads"),
    ({"scale_depth": 1.5}, r"scale_depth is 1\.5, but the base model's is 1\.4"),
    ({"scale_depth": ...}, r"scale_depth is missing, but the base model's is 1\.4"),
    ({"scale_emb": 1}, r"scale_emb is 1, but the base model's is 12"),
    ({"scale_emb": ...}, r"scale_emb is missing, but the base model's is 12"),
    ({"dim_model_base": 256}, r"dim_model_base is 256, but the base model's is 32"),
    ({"dim_model_base": ...}, r"dim_model_base is missing"),
    ({"hidden_size": ...}, r"hidden_size is missing but must be an integer"),
    ({"intermediate_size": 0}, r"intermediate_size 0 must be positive"),
    ({"attention_bias": True}, r"attention_bias is true"),
    ({"hidden_act": "gelu"}, r"hidden_act is gelu"),
    ({"quantization_config": {"quant_method": "awq"}}, r"quantised with awq"),
    ({"intermediate_size": 128}, r"mlp\.gate_proj\.weight has shape \[96, 64\].*ask for \[128, 64\]"),
]


@pytest.mark.parametrize(("changes", "words"), CHANGES, ids=[words[:30] for _, words in CHANGES])
def test_a_configuration_of_another_model_is_refused(
    changes: dict[str, Any], words: str, base: Checkpoint, tmp_path: Path
) -> None:
    write_draft(tmp_path, draft_config(BASE), draft_weights(draft_config(BASE)))
    (tmp_path / "config.json").write_text(json.dumps(draft_config(BASE, **changes)))
    with pytest.raises(EdgeError, match=words) as caught:
        open_draft(tmp_path, base)
    assert "\n" not in str(caught.value)


TENSORS: list[tuple[str, dict[str, tuple[int, ...]], str]] = [
    ("layers.0.mlp.up_proj.weight", {}, r"mlp\.up_proj\.weight is missing"),
    ("fc.weight", {}, r"fc\.weight is missing"),
    ("layers.0.post_attention_layernorm.weight", {}, "post_attention_layernorm.weight is missing"),
    ("", {"layers.1.mlp.up_proj.weight": (96, 64)}, "layers.1.mlp.up_proj.weight has no place in an EAGLE draft"),
    ("", {"lm_head.weight": (320, 64)}, "lm_head.weight has no place"),
    ("", {"midlayer.hidden_norm.weight": (64,)}, "is of an EAGLE-3 draft"),
    ("fc.weight", {"fc.weight": (64, 192)}, r"fc\.weight has shape \[64, 192\].*\[64, 128\]"),
]


@pytest.mark.parametrize(("drop", "add", "words"), TENSORS)
def test_other_tensors_are_refused(
    drop: str, add: dict[str, tuple[int, ...]], words: str, base: Checkpoint, tmp_path: Path
) -> None:
    config = draft_config(BASE)
    weights = draft_weights(config)
    weights.pop(drop, None)
    for file in ("model.safetensors", "pytorch_model.bin"):
        folder = tmp_path / file
        write_draft(folder, config, weights | {name: np.ones(s, np.float32) for name, s in add.items()}, file=file)
        with pytest.raises(EdgeError, match=words):
            open_draft(folder, base)


def test_folders_without_weights_or_with_several_are_refused(base: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no config\.json"):
        open_draft(tmp_path, base)
    config = draft_config(BASE)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(EdgeError, match="has 0 files of weights"):
        open_draft(tmp_path, base)
    write_draft(tmp_path, config, draft_weights(config), file="pytorch_model.bin")
    write_draft(tmp_path, config, draft_weights(config), file="other.bin")
    with pytest.raises(EdgeError, match="has 2 files of weights"):
        open_draft(tmp_path, base)
    (tmp_path / "other.bin").unlink()
    torch.save({"fc.weight": torch.ones(64, 128, dtype=torch.int64)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(EdgeError, match=r"fc\.weight is stored as int64"):
        open_draft(tmp_path, base)
    torch.save([torch.ones(3)], tmp_path / "pytorch_model.bin")
    with pytest.raises(EdgeError, match="something else than tensors"):
        open_draft(tmp_path, base)


def test_int4_tensors_need_their_configuration(base: Checkpoint, tmp_path: Path) -> None:
    config = draft_config(BASE, intermediate_size=128, num_attention_heads=4, num_key_value_heads=4)
    write_int4_draft(tmp_path, config, draft_weights(config), 64, marlin=False)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(EdgeError, match=r"config\.json has no quantization_config"):
        open_draft(tmp_path, base)


def test_a_llama_has_no_scales(tmp_path: Path) -> None:
    """And a draft that says them may say its neutral ones."""
    llama = tiny_llama_config()
    checkpoint = open_checkpoint(write_hf_checkpoint(tmp_path / "base", llama))
    without = dict.fromkeys(("scale_emb", "scale_depth", "dim_model_base"), ...)
    config = draft_config(llama, **without)
    write_draft(tmp_path / "draft", config, draft_weights(config))
    found = open_draft(tmp_path / "draft", checkpoint).config
    assert found.residual_scale == 1 and found.logit_scale == 1
    config = draft_config(llama, **neutral_mup(llama.num_hidden_layers, llama.hidden_size))
    write_draft(tmp_path / "draft", config, draft_weights(config))
    assert open_draft(tmp_path / "draft", checkpoint).config.residual_scale == pytest.approx((2 / 3) ** 0.5)


@pytest.mark.parametrize("kind", ["bfloat16", "GGUF", "int4"])
def test_a_pruned_head_has_the_bases_rows(kind: str, tmp_path: Path) -> None:
    """Of 16 bits, of a quantised file, and of codes, which stay codes."""
    config = tiny_config(tie_word_embeddings=False, hidden_size=64, vocab_size=320)
    if kind == "GGUF":
        base = open_checkpoint(write_gguf_checkpoint(tmp_path / "base.gguf", config, quant="Q8_0"))
    elif kind == "int4":
        write_gptq_folder(tmp_path / "base", config, 32, lm_head=True)
        base = open_checkpoint(tmp_path / "base")
    else:
        base = open_checkpoint(write_hf_checkpoint(tmp_path / "base", config))
    draft = draft_config(config)
    write_draft(tmp_path / "draft", draft, draft_weights(draft))
    ids = np.array([300, 2, 4, 17, 0, 319], np.int32)
    joined = with_base(open_draft(tmp_path / "draft", base), base, ids)
    head, whole = joined.tensors["draft.lm_head.weight"], base.tensors["lm_head.weight"]
    assert "lm_head.weight" not in joined.tensors and head.shape == (6, 64)
    assert np.array_equal(head.read(slice(1, 5)), whole.read(slice(None))[ids[1:5]])
    if kind == "int4":
        assert head.codes is not None and whole.codes is not None
        for mine, theirs in zip(head.codes.read(slice(0, 6)), whole.codes.read(slice(None)), strict=True):
            assert np.array_equal(mine, theirs[ids])


def test_damaged_safetensors_are_named(base: Checkpoint, tmp_path: Path) -> None:
    config = draft_config(BASE)
    write_draft(tmp_path, config, draft_weights(config))
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors, tmp_path / "model.safetensors")
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(EdgeError, match=re.escape(str(path))):
        open_draft(tmp_path, base)
