"""Files that torch itself wrote are read to the bit, and none of them gets anything executed."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from edge.errors import EdgeError
from edge.torch_file import load_torch_file

DTYPES = {
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.int64: np.int64,
    torch.int32: np.int32,
}


def save(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_are_what_torch_saved(dtype: torch.dtype, tmp_path: Path) -> None:
    wide = torch.arange(-30, 30).reshape(5, 12)
    tensors = {
        "a": wide.to(dtype),
        "part": wide.to(dtype)[2:4],
        "one": wide.to(dtype)[0, 0],
        "none": wide[:0].to(dtype),
    }
    found = load_torch_file(save(tmp_path / "x.bin", tensors))
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == DTYPES[dtype] and found[name].shape == tuple(tensor.shape)
        assert np.array_equal(found[name].astype(np.float64), tensor.double().numpy())
        assert not found[name].flags.writeable


def test_a_modules_state_is_read(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 2)
    for state in (module.state_dict(), dict(module.named_parameters())):
        found = load_torch_file(save(tmp_path / "m.bin", state))
        assert np.array_equal(found["weight"], module.weight.detach().numpy())


def test_lists_of_numbers_are_read(tmp_path: Path) -> None:
    values = [5, 0, 300, 70_000, 1 << 40]
    assert load_torch_file(save(tmp_path / "freq.pt", values)) == values


class Shout:
    """Its pickle runs a command when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return exec, (f"open({str(self.file)!r}, 'w').close()",)


def replace_pickle(path: Path, program: bytes) -> Path:
    """The file with another pickle."""
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, program if name.endswith("data.pkl") else data)
    return path


@pytest.mark.parametrize("protocol", range(6))
def test_a_malicious_pickle_runs_nothing(protocol: int, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    path = save(tmp_path / "freq.pt", [1, 2, 3])
    program = pickle.dumps([1, Shout(proof)], protocol)
    with pytest.raises(EdgeError, match=r"asks for \w+\.exec"):
        load_torch_file(replace_pickle(path, program))
    assert not proof.exists()
    pickle.loads(program)
    assert proof.exists(), "the pickle would have run"


@pytest.mark.parametrize(
    "program",
    [
        b"cbuiltins\nexec\n(S'1'\ntR.",
        b"cos\nsystem\n(S'true'\ntR.",
        b"ctorch._utils\n_rebuild_device_tensor_from_numpy\n)R.",
        b"(S'x'\nitorch.hub\nload\n.",
        b"ctorch\nload\n.",
        b"cedge.torch_file\nload_torch_file\n.",
        b"ccollections\nOrderedDict\n.",  # allowed, but as a value it is none
        b"ctorch\nFloatStorage\n(S'1'\ntR.",
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.",
        b"S'x'\nQ.",
        b"(lp0\nr\xff\xff\xff\x7f.",  # a memo of two thousand million places
        b"",
        b"\xff\xfe",
    ],
)
def test_no_other_pickle_is_read(program: bytes, tmp_path: Path) -> None:
    path = replace_pickle(save(tmp_path / "freq.pt", [1]), program)
    if program.startswith(b"(lp0"):
        assert load_torch_file(path) == []
        return
    with pytest.raises(EdgeError, match=r"freq\.pt is (not read|damaged)"):
        load_torch_file(path)


def test_a_tensor_beyond_its_storage_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", torch.arange(8, dtype=torch.int32))
    with zipfile.ZipFile(path) as archive:
        program = archive.read("x/data.pkl")
    for old, new in (
        (b"K\x08\x85", b"K\x09\x85"),
        (b"K\x00K\x08", b"K\x04K\x08"),
        (b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x009"),
    ):
        assert old in program
        with pytest.raises(EdgeError, match="damaged"):
            load_torch_file(replace_pickle(save(path, torch.arange(8, dtype=torch.int32)), program.replace(old, new)))


@pytest.mark.parametrize("view", [lambda x: x.T, lambda x: x[:, ::2]])
def test_a_strided_view_is_named(view: Any, tmp_path: Path) -> None:
    with pytest.raises(EdgeError, match="transposed or strided"):
        load_torch_file(save(tmp_path / "x.bin", {"w": view(torch.ones(4, 6))}))


def test_other_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save([1], path, _use_new_zipfile_serialization=False)
    with pytest.raises(EdgeError, match=r"since torch 1\.6"):
        load_torch_file(path)
    for data in (b"", b"PK", b"hello"):
        path.write_bytes(data)
        with pytest.raises(EdgeError, match=r"since torch 1\.6"):
            load_torch_file(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/y", b"")
    with pytest.raises(EdgeError, match=r"no readable data\.pkl"):
        load_torch_file(path)
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(100)}, buffer)
    whole = buffer.getvalue()
    for end in (len(whole) // 3, len(whole) - 30):
        path.write_bytes(whole[:end])
        with pytest.raises(EdgeError):
            load_torch_file(path)
