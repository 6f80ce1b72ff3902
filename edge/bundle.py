"""A bundle: one folder with everything an executor needs, described and sealed by its manifest.json.

build_engine/export.py writes bundles; the device only ever reads them through `open_bundle`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edge.config import DraftConfig, ModelConfig
from edge.errors import EdgeError, UsageError
from edge.kv_cache import KV_BYTES
from plugins.launch import module_file

SCHEMA_VERSION = 3
MANIFEST = "manifest.json"
GRAPH = "model.onnx"
WEIGHTS = "model.weights"
TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"
DRAFT_GRAPH = "draft.onnx"
DRAFT_VOCAB = "draft_vocab.npy"  # int32 [V']: the tokens of a draft model with a head of its own


@dataclass(frozen=True)
class FileEntry:
    """One file of the bundle as it was written."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class DraftSection:
    """A bundle's draft model. weights and types: as in the manifest. tree: depth, top_k and size of its trees of
    guesses where the user does not say (spec: quantization_and_speculation.md 4.7).
    """

    name: str
    model: DraftConfig
    weights: dict[str, Any]
    types: dict[str, str]
    tree: dict[str, int]


@dataclass(frozen=True)
class Manifest:
    """What the bundle is. `key` covers all that can change a result; `tools` and `name` do not count."""

    name: str
    model: ModelConfig
    weights: dict[str, Any]
    target: str
    types: dict[str, str]
    limits: dict[str, int]
    text: dict[str, Any] | None
    generation: dict[str, Any]
    files: dict[str, FileEntry]
    tools: dict[str, str]
    schema_version: int = SCHEMA_VERSION
    draft: DraftSection | None = None

    @property
    def key(self) -> str:
        """sha256 over the model, formats, limits and every file's hash."""
        content = {k: v for k, v in self.to_dict().items() if k not in ("name", "tools", "key")}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values without the key; no draft is none, so that such bundles are what they always were."""
        values = asdict(self)
        if self.draft is None:
            del values["draft"]
        return values

    def to_json(self) -> str:
        """The text of manifest.json."""
        return json.dumps({**self.to_dict(), "key": self.key}, indent=1, ensure_ascii=False) + "\n"

    @staticmethod
    def from_json(text: str) -> Manifest:
        """Raises KeyError, TypeError or ValueError if it is no manifest of this schema."""
        values = json.loads(text)
        key = values.pop("key")
        values["model"] = ModelConfig.from_dict(values["model"])
        values["files"] = {name: FileEntry(**entry) for name, entry in values["files"].items()}
        if "draft" in values:
            section = values["draft"]
            values["draft"] = DraftSection(**{**section, "model": DraftConfig.from_dict(section["model"])})
        manifest = Manifest(**values)
        if manifest.key != key:
            raise ValueError("its key does not match its contents")
        manifest._check()
        return manifest

    def _check(self) -> None:
        """Raise ValueError unless it holds what a run relies on; the key shows edits, not mistakes of a writer."""
        sound = {
            "name": isinstance(self.name, str),
            "weights": all(isinstance(self.weights[k], str) for k in ("kind", "description")),
            "types": self.types["kv"] in KV_BYTES
            and self.types["activation"] in KV_BYTES.keys() - {"int8"}
            and "embedding" in self.types,
            "limits": type(self.limits["max_context"]) is int and self.limits["max_context"] > 0,
            "text": self.text is None or isinstance(self.text, dict),
            "generation": isinstance(self.generation, dict),
            "files": {GRAPH, WEIGHTS} <= self.files.keys() and all(Path(name).name == name for name in self.files),
            "tools": isinstance(self.tools, dict),
            "draft": self.draft is None or self._has_draft(self.draft),
        }
        if wrong := [name for name, fine in sound.items() if not fine]:
            raise ValueError(f"unusable {wrong[0]}")

    def _has_draft(self, draft: DraftSection) -> bool:
        files = {DRAFT_GRAPH} if draft.model.vocab_size is None else {DRAFT_GRAPH, DRAFT_VOCAB}
        return (
            files <= self.files.keys()
            and draft.types["kv"] in KV_BYTES
            and all(isinstance(draft.weights[k], str) for k in ("kind", "description"))
            and all(type(draft.tree[k]) is int and draft.tree[k] > 0 for k in ("depth", "top_k", "size"))
        )


@dataclass(frozen=True)
class Bundle:
    """An opened bundle."""

    path: Path
    manifest: Manifest

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        return self.manifest.model

    def file(self, name: str) -> Path:
        """Path of a file of the bundle."""
        return self.path / name

    def kernels(self, architecture: str) -> bytes:
        """The machine code for 'sm_87'; EdgeError says for which GPUs there is some."""
        name = module_file(architecture)
        if name not in self.manifest.files:
            there = ", ".join(sorted(other for other in self.manifest.files if other.endswith(".cubin"))) or "none"
            raise EdgeError(
                f"{self.path} has no kernels for this GPU ({architecture}), only {there}; export it with the --target "
                "of this device"
            )
        return self.file(name).read_bytes()


def is_bundle(path: Path) -> bool:
    """Whether the folder claims to be a bundle (it may still be damaged)."""
    return (path / MANIFEST).is_file()


def open_bundle(path: Path, *, verify: bool = True) -> Bundle:
    """Read the manifest and, if `verify`, check every file's size and hash; a damaged file is named."""
    if not path.is_dir():
        raise UsageError(f"{path} is not a folder; give the folder that `edge export` wrote")
    if not is_bundle(path):
        raise UsageError(f"{path} has no {MANIFEST}, so it is not a bundle; make one with `edge export`")
    try:
        text = (path / MANIFEST).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise EdgeError(f"{path / MANIFEST} cannot be read ({error.strerror}); check its permissions") from None
    try:
        version = json.loads(text)["schema_version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise EdgeError(f"{path / MANIFEST} is damaged (no readable schema_version); export the bundle again") from None
    if version != SCHEMA_VERSION:
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        remedy = "update minicpm-edge" if newer else "export it again with this version"
        raise EdgeError(f"{path} has bundle schema {version}, this version reads schema {SCHEMA_VERSION}; {remedy}")
    try:
        manifest = Manifest.from_json(text)
    except KeyError as error:
        raise EdgeError(f"{path / MANIFEST} is damaged (no {error}); export the bundle again") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise EdgeError(f"{path / MANIFEST} is damaged ({error}); export the bundle again") from None
    for name, entry in manifest.files.items():
        _check_file(path / name, entry, verify)
    return Bundle(path, manifest)


def hash_file(path: Path) -> str:
    """sha256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _check_file(path: Path, entry: FileEntry, verify: bool) -> None:
    try:
        size = path.stat().st_size
        sound = size == entry.bytes and (not verify or hash_file(path) == entry.sha256)
    except FileNotFoundError:
        raise EdgeError(f"the bundle's file {path} is missing; copy it again or export the bundle again") from None
    except OSError as error:
        raise EdgeError(f"the bundle's file {path} cannot be read ({error.strerror}); check its permissions") from None
    if not sound:
        what = (
            f"{size} bytes instead of {entry.bytes}"
            if size != entry.bytes
            else "its sha256 differs from the manifest's"
        )
        raise EdgeError(f"the bundle's file {path} is damaged: {what}; copy it again or export the bundle again")
