"""The trained draft: the published layout and formula, and guesses that are right often enough."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from build_engine.checkpoint import Checkpoint
from build_engine.draft_export import TREE, choose_draft
from build_engine.export import ExportOptions, export_bundle
from build_engine.formats import WeightFormat
from edge.config import ModelConfig
from edge.engine import open_engine
from edge.plan import EngineOptions
from edge.sampler import SamplingParams
from edge.speculation.speculator import Choice
from edge.speculation.tree import TokenTree
from tests.draft.acceptance import Shape, acceptance, grow
from tests.draft.checkpoint import MODEL, load_draft
from tests.draft.corpus import chat_prompts, chat_tokenizer
from tests.draft.model import shapes, unrolled
from tests.draft.prompts import TEMPLATES, WORDS, prompts, words
from tests.draft.target import Text, batched_target, write
from tests.ledger_run import paced
from tests.reference import greedy_tokens, llama_from_gguf

REPLY = 48
EXACT = WeightFormat("exact")


@pytest.fixture(scope="module")
def target(smollm2_gguf: Path, smollm2: Checkpoint) -> PreTrainedModel:
    return llama_from_gguf(smollm2_gguf, smollm2.config)


@pytest.fixture(scope="module")
def embedding(target: PreTrainedModel) -> torch.Tensor:
    return target.get_input_embeddings().weight.detach()


@pytest.fixture(scope="module")
def replies(target: PreTrainedModel, smollm2: Checkpoint) -> list[Text]:
    """Greedy replies to held-out prompts."""
    questions = chat_prompts(chat_tokenizer(smollm2), "held-out", 14)
    batched = batched_target(smollm2.config, target, torch.float32)
    return write(batched, questions, REPLY, 0.0, torch.Generator())


def test_the_files_have_the_published_layout(smollm2: Checkpoint) -> None:
    config, stored = smollm2.config, load_file(MODEL / "model.safetensors")
    assert {name: array.shape for name, array in stored.items()} == shapes(config)
    assert all(array.dtype == np.float16 and np.isfinite(array).all() for array in stored.values())
    assert sum(path.stat().st_size for path in MODEL.iterdir()) < 10e6
    values = json.loads((MODEL / "config.json").read_text())
    for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "rope_theta", "rms_norm_eps", "scale_emb",
                 "scale_depth", "dim_model_base", "vocab_size"):  # fmt: skip
        assert values[name] == getattr(config, name), name


def test_frequent_tokens_are_distinct_and_hold_all_that_a_reply_needs(smollm2: Checkpoint) -> None:
    (path,) = MODEL.glob("freq_*.npy")
    vocab = np.load(path, allow_pickle=False)
    assert vocab.dtype == np.int32 and path.name == f"freq_{len(vocab)}.npy"
    assert len(np.unique(vocab)) == len(vocab) and vocab.min() >= 0 and vocab.max() < smollm2.config.vocab_size
    assert smollm2.text is not None
    tokenizer = Tokenizer.from_str(smollm2.text.tokenizer_json)
    assert tokenizer.token_to_id("Ġthe") in vocab[:16], "the most frequent are not first"
    assert set(smollm2.config.eos_token_ids) <= set(vocab.tolist())


def test_held_out_prompts_share_nothing_with_the_training_prompts() -> None:
    assert not set(TEMPLATES["train"]) & set(TEMPLATES["held-out"])
    for kind in WORDS:
        assert not set(words(kind, "train")) & set(words(kind, "held-out")) and words(kind, "held-out")
    assert not set(prompts("train", 3600)) & set(prompts("held-out", 200))


def numpy_draft(
    w: dict[str, np.ndarray], config: ModelConfig, embedded: np.ndarray, hidden: np.ndarray, passed: list[np.ndarray]
) -> np.ndarray:
    """y [H] of one slot, whose number is the count of `passed` slots, by the formula of the specification (4.1).

    `embedded` [H] is the embedding of token i + 1, `hidden` [H] the state of token i; `passed` takes the slot's key and
    value [2, Hkv, d].
    """
    c, d = config, config.head_dim

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        scaled: np.ndarray = x / np.sqrt(np.mean(x * x) + c.rms_norm_eps) * w[f"{name}.weight"]
        return scaled

    def turned(heads: np.ndarray) -> np.ndarray:
        angle = len(passed) * c.rope_theta ** (-np.arange(0, d, 2) / d)
        z = (heads[:, : d // 2] + 1j * heads[:, d // 2 :]) * np.exp(1j * angle)
        return np.concatenate([z.real, z.imag], 1)

    fc1, fc2 = np.split(w["fc.weight"], 2, axis=1)
    z = fc1 @ norm(embedded, "input_norm1") + fc2 @ norm(hidden, "input_norm2")
    r = c.scale_depth / np.sqrt(c.num_hidden_layers + 1)
    x = norm(z, "layers.0.input_layernorm")
    q, k, v = ((w[f"layers.0.self_attn.{n}_proj.weight"] @ x).reshape(-1, d) for n in "qkv")
    q = turned(q)
    passed.append(np.stack([turned(k), v]))
    cache = np.stack(passed)  # [slots, 2, Hkv, d]
    heads = []
    for head in range(c.num_attention_heads):
        keys, values = cache[:, :, head // c.group_size].swapaxes(0, 1)
        shares = np.exp(keys @ q[head] / np.sqrt(d))
        heads.append(shares @ values / shares.sum())
    z = z + r * (w["layers.0.self_attn.o_proj.weight"] @ np.concatenate(heads))
    x = norm(z, "layers.0.post_attention_layernorm")
    gate, up = (w[f"layers.0.mlp.{n}_proj.weight"] @ x for n in ("gate", "up"))
    return np.asarray(z + r * (w["layers.0.mlp.down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * up)))


def numpy_chain(config: ModelConfig, embedding: np.ndarray, text: Text, root: int, guess: list[int]) -> np.ndarray:
    """Outputs [1 + len(guess), H] of a draft whose root is token `root` of `text`, going on with the tokens `guess`."""
    w = {name: array.astype(np.float64) for name, array in load_file(MODEL / "model.safetensors").items()}
    ids, states = text.ids.tolist(), text.states.double().numpy()
    passed: list[np.ndarray] = []
    for slot in range(root):
        y = numpy_draft(w, config, embedding[ids[slot + 1]], states[slot], passed)
    outputs = [y]
    for token in guess:
        outputs.append(numpy_draft(w, config, embedding[token], outputs[-1], passed))
    return np.stack(outputs)


def test_training_unrolls_the_published_formula(
    replies: list[Text], smollm2: Checkpoint, embedding: torch.Tensor
) -> None:
    text, draft, root = replies[0], load_draft(MODEL), replies[0].first + 9
    begin = text.first - 1
    ids = text.ids.long()
    with torch.inference_mode():
        given = F.pad(embedding[ids[1:]], (0, 0, 2, 0))[None], F.pad(text.states.float(), (0, 0, 2, 0))[None]
        steps = unrolled(draft.weights, smollm2.config, *given, torch.tensor([2]), 2 + begin, 3)
        found = [y[0, root - 1 - begin + number].numpy() for number, y in enumerate(steps)]
    guess = ids[root + 1 : root + 3].tolist()
    wanted = numpy_chain(smollm2.config, embedding.double().numpy(), text, root, guess)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-3 * np.abs(wanted).max())


def test_a_tree_of_one_branch_is_the_published_formula(
    replies: list[Text], smollm2: Checkpoint, embedding: torch.Tensor
) -> None:
    text, draft, root = replies[1], load_draft(MODEL), replies[1].first + 5
    with torch.inference_mode():
        tree = grow(draft, smollm2.config, embedding, text, Shape(1, 3, 4))
    guess = tree.tokens[root - text.first].tolist()
    outputs = numpy_chain(smollm2.config, embedding.double().numpy(), text, root, guess[:-1])
    logits = outputs @ embedding[draft.vocab].double().numpy().T
    assert draft.vocab[logits.argmax(1)].tolist() == guess


def test_the_replies_are_what_transformers_writes(replies: list[Text], target: PreTrainedModel) -> None:
    text = replies[2]
    prompt, reply = text.ids[: text.first].tolist(), text.ids[text.first :].tolist()
    assert greedy_tokens(target, prompt, len(reply)) == reply
    with torch.inference_mode():
        states = target.model(text.ids[None, :-1].long()).last_hidden_state[0]
    np.testing.assert_allclose(text.states.numpy(), states.numpy(), rtol=2e-3, atol=2e-2)


# Floors just below what the committed weights reach here (README.md has the figures of more replies).
@pytest.mark.parametrize(
    ("shape", "least"), [(Shape(4, 3, 8), 1.95), (Shape(1, 3, 4), 1.55)], ids=["tree of 8 nodes", "chain of 3"]
)
def test_held_out_replies_are_guessed_as_well_as_measured(
    shape: Shape, least: float, replies: list[Text], smollm2: Checkpoint, embedding: torch.Tensor
) -> None:
    result = acceptance(load_draft(MODEL), smollm2.config, embedding, replies, shape)
    assert result.mean >= least


class Fixed:
    """A pace that always wants the same tree."""

    def __init__(self, shape: Shape) -> None:
        self._wanted = shape.nodes - 1, shape.depth

    def beside(self, sequences: int) -> Fixed:
        """Itself."""
        return self

    def choose(self, most_rows: int, most_depth: int) -> Choice:
        """It, as far as may be."""
        return Choice(min(most_rows, self._wanted[0]), min(most_depth, self._wanted[1]), 1.0)

    def plain(self, seconds: float) -> None:
        """Nothing to learn."""

    def verified(self, tree: TokenTree, path: Sequence[int], seconds: float, draft_seconds: float = 0.0) -> None:
        """Nothing to learn."""


def test_the_engine_accepts_what_the_recipe_does(
    replies: list[Text], smollm2: Checkpoint, embedding: torch.Tensor, tmp_path: Path
) -> None:
    """Replies are the same whatever a draft is fed: only acceptance tells that it gets the right states and slots."""
    draft = choose_draft(MODEL, smollm2, EXACT, "onnxruntime", np.load(next(MODEL.glob("freq_*.npy"))))
    bundle = export_bundle(smollm2, tmp_path / "bundle", ExportOptions(weights=EXACT, draft=draft))
    engine = open_engine(bundle, EngineOptions(context=1024, threads=2, speculative="eagle"))
    shape = Shape(TREE["top_k"], TREE["depth"], TREE["size"])
    assert engine.speculation is not None
    engine.speculation = paced(engine.speculation, Fixed(shape))
    few = replies[:6]
    wanted = acceptance(load_draft(MODEL), smollm2.config, embedding, few, shape)
    for text in few:
        ids = text.ids.tolist()
        params = SamplingParams(max_tokens=len(ids) - text.first)
        found = [event.token_id for event in engine.generate(ids[: text.first], params)]
        assert found == ids[text.first :]
    mean = engine.speculation.totals.mean_accept_length
    assert mean == pytest.approx(wanted.mean, rel=0.03)


def test_acceptance_notices_a_draft_that_guesses_badly(
    replies: list[Text], smollm2: Checkpoint, embedding: torch.Tensor
) -> None:
    """The measure can fail: without the embedding of the last token, little is guessed."""
    draft = load_draft(MODEL)
    hidden = smollm2.config.hidden_size
    draft.weights["fc.weight"] = F.pad(draft.weights["fc.weight"][:, hidden:], (hidden, 0))
    result = acceptance(draft, smollm2.config, embedding, replies, Shape(4, 3, 8))
    assert 1.0 <= result.mean < 1.3
