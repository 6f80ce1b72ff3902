"""Kernels become machine code by NVIDIA's wheels, once each, and the code is read back correctly."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from build_engine.checkpoint import Checkpoint, open_checkpoint
from build_engine.export import ExportOptions, export_bundle
from build_engine.formats import WeightFormat
from edge.bundle import open_bundle
from edge.config import SparseConfig
from edge.errors import EdgeError
from plugins.build.cache import ROOT, cache_folder, source_files, source_key, write_atomically
from plugins.build.cost import hot_loop
from plugins.build.embed import TARGETS
from plugins.build.nvrtc import ARCHITECTURES, TOOLCHAINS, CompileError, Toolchain, cubin, ptx
from plugins.build.registry import kernels_for
from plugins.build.sass import Instruction, KernelCode, read_cubin
from plugins.build.wheels import wheel_file
from plugins.launch import Kernel, module_file
from plugins.rms_norm.launch import rms_norm
from tests.synthetic import tiny_config, write_hf_checkpoint

KERNEL = rms_norm(1, 4096, "half", 1e-6).kernel


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_instructions_and_stalls_are_those_that_cuobjdump_lists(architecture: str, tmp_path: Path) -> None:
    module = cubin([KERNEL], architecture)
    (tmp_path / "module.cubin").write_bytes(module)
    program = wheel_file("nvidia-cuda-cuobjdump", "nvidia/cu13/bin/cuobjdump")
    listing = subprocess.run([program, "-sass", tmp_path / "module.cubin"], capture_output=True, text=True).stdout
    lines = re.findall(
        r"/\*([0-9a-f]{4})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.a-z]+).*\n\s+/\* 0x([0-9a-f]{16}) \*/", listing
    )
    theirs = [(int(address, 16), opcode, int(control, 16) >> 41 & 15) for address, opcode, control in lines]
    (code,) = read_cubin(module).values()
    assert [(i.address, i.opcode, i.stall) for i in code.instructions] == theirs
    assert len(theirs) > 40 and max(stall for *_, stall in theirs) > 3


def code_of(*lines: str) -> KernelCode:
    """A kernel of instructions '@P0 BRA 0x10', at addresses 0, 0x10, 0x20, ..."""
    parts = [re.fullmatch(r"(@!?P\d)? ?(\S+) ?(.*)", line) for line in lines]
    instructions = [Instruction(16 * i, p[1] or "", p[2], p[3], 1) for i, p in enumerate(parts) if p]
    return KernelCode("k", "sm_87", 32, 0, 0, tuple(instructions))


def test_loops_are_where_a_branch_goes_back_to_what_dominates_it() -> None:
    nested = code_of("MOV", "FADD", "HMMA", "@P0 BRA 0x20", "@!P1 BRA 0x10", "EXIT", "BRA 0x60", "NOP")
    assert [(loop.header, len(loop.instructions)) for loop in nested.loops] == [(0x10, 4), (0x20, 2)]
    assert nested.loops[0].contains(nested.loops[1])
    # 0x40 is code that was moved behind the end; the way back from there closes no loop.
    assert code_of("@P0 BRA 0x40", "FADD", "EXIT", "NOP", "FMUL", "BRA 0x10").loops == ()
    two_ways_back = code_of("MOV", "FADD", "@P0 BRA 0x10", "CALL.REL.NOINC 0x50", "@P1 BRA 0x10", "EXIT")
    assert [(loop.header, len(loop.instructions)) for loop in two_ways_back.loops] == [(0x10, 4)]


def test_of_two_loops_with_the_same_mma_the_one_that_does_not_mask_is_hot() -> None:
    twins = code_of("MOV", "HMMA", "FSEL", "@P0 BRA 0x10", "HMMA", "@P0 BRA 0x40", "FADD", "@P0 BRA 0x60", "EXIT")
    hot = hot_loop(twins)
    assert hot is not None and hot.header == 0x40
    more = hot_loop(code_of("HMMA", "HMMA", "FSEL", "FSEL", "@P0 BRA 0x0", "HMMA", "@P0 BRA 0x50", "EXIT"))
    assert more is not None and more.header == 0
    longer = hot_loop(code_of("FADD", "@P0 BRA 0x0", "FADD", "FADD", "@P0 BRA 0x20", "EXIT"))
    assert longer is not None and longer.header == 0x20


def test_a_compile_error_names_file_line_and_reason() -> None:
    with pytest.raises(CompileError) as caught:
        cubin([Kernel("swiglu/kernel.cu", "swiglue<half>", "SwigluArguments", 32)], "sm_120")
    sentence = str(caught.value)
    assert sentence.startswith("plugins/swiglu/kernel.cu does not compile for sm_120: ") and "swiglue" in sentence
    assert "\n" not in sentence and "error" in caught.value.log


def test_ptx_has_source_lines_and_cubins_no_folder_of_this_machine() -> None:
    assert ".loc" in ptx([KERNEL], "sm_87") and ".target sm_87" in ptx([KERNEL], "sm_87")
    assert all(str(ROOT).encode() not in cubin([KERNEL], a) for a in ARCHITECTURES)


def test_unknown_architectures_and_missing_wheels_are_named() -> None:
    with pytest.raises(EdgeError, match="not compiled for 'sm_75'; choose from sm_87"):
        cubin([], "sm_75")
    with pytest.raises(
        EdgeError, match=r"needs the package nvidia-no-such-wheel; pip install 'minicpm-edge\[kernels\]'"
    ):
        wheel_file("nvidia-no-such-wheel", "nvidia/x")
    with pytest.raises(EdgeError, match="nvidia-cuda-nvrtc with nvidia/x"):
        wheel_file("nvidia-cuda-nvrtc", "nvidia/x")


def test_a_cached_module_is_used_until_a_source_changes(tmp_path: Path) -> None:
    (tmp_path / "plugins").mkdir()
    for name, text in {
        "a.cuh": '#include "plugins/b.cuh"\n',
        "b.cuh": '#include "plugins/a.cuh"\n',
        "c.cuh": "",
    }.items():
        (tmp_path / "plugins" / name).write_text(text)
    unit = '#include "plugins/a.cuh"\n'
    assert [path.name for path in source_files(unit, tmp_path)] == ["a.cuh", "b.cuh"]
    key = source_key(unit, ["-O3"], tmp_path)
    (tmp_path / "plugins" / "c.cuh").write_text("int unused;")
    assert source_key(unit, ["-O3"], tmp_path) == key
    (tmp_path / "plugins" / "b.cuh").write_text("int used;")
    assert source_key(unit, ["-O3"], tmp_path) != key != source_key(unit, ["-O2"], tmp_path)


def test_the_cache_lies_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("EDGE_CACHE", raising=False)
    assert cache_folder("nvrtc") == tmp_path / "xdg/minicpm-edge/nvrtc"
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path / "own"))
    assert cache_folder("nvrtc") == tmp_path / "own/nvrtc"
    module = cubin([KERNEL], "sm_89")
    (file,) = (tmp_path / "own/nvrtc").iterdir()
    assert file.read_bytes() == module
    write_atomically(file, b"cached")
    assert cubin([KERNEL], "sm_89") == b"cached"
    monkeypatch.setenv("EDGE_CACHE", str(file))
    with pytest.raises(EdgeError, match="set EDGE_CACHE to a folder"):
        cache_folder("nvrtc")


# ---- bundles -----------------------------------------------------------------------------------------------


def checkpoint_of(folder: Path, **sizes: int) -> Checkpoint:
    return open_checkpoint(write_hf_checkpoint(folder / "checkpoint", tiny_config(**sizes)))


def test_a_bundle_for_rtx_has_a_module_with_the_models_kernels_for_each_architecture(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, hidden_size=128, head_dim=64, num_attention_heads=2)
    bundle = open_bundle(export_bundle(checkpoint, tmp_path / "out", ExportOptions("rtx", WeightFormat("exact"))))
    assert TARGETS["rtx"] == ("sm_86", "sm_89", "sm_120")
    symbols = {kernel.symbol for kernel in kernels_for(checkpoint.config, "half", "half", None, None)}
    assert "attention_attend_split_half_64_half_8" in symbols
    for architecture in TARGETS["rtx"]:
        assert module_file(architecture) in bundle.manifest.files
        kernels = read_cubin(bundle.file(module_file(architecture)).read_bytes())
        assert kernels.keys() == symbols
        assert {code.architecture for code in kernels.values()} == {architecture}


def test_a_model_without_kernels_is_exported_without_modules(tmp_path: Path) -> None:
    """Its operators run as ONNX functions; head_dim 16 is none of the attention kernels'."""
    out = export_bundle(checkpoint_of(tmp_path), tmp_path / "out", ExportOptions("rtx", WeightFormat("exact")))
    assert not [name for name in open_bundle(out).manifest.files if name.endswith(".cubin")]
    with pytest.raises(EdgeError, match="head_dim 16"):
        kernels_for(tiny_config(), "half", "half", None, None)


def test_without_the_compilers_nothing_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = checkpoint_of(tmp_path, hidden_size=128, head_dim=64, num_attention_heads=2)
    monkeypatch.setitem(TOOLCHAINS, "sm_89", Toolchain(("nvidia-no-such-wheel", "nvidia/x"), ()))
    with pytest.raises(EdgeError, match=r"pip install 'minicpm-edge\[kernels\]'"):
        export_bundle(checkpoint, tmp_path / "out", ExportOptions("rtx", WeightFormat("exact")))
    assert not (tmp_path / "out").exists()


def test_all_that_a_quantised_sparse_model_may_launch_is_listed_once() -> None:
    config = tiny_config(head_dim=128, hidden_size=256, intermediate_size=512, sparse=SparseConfig())
    kernels = kernels_for(config, "half", "uint8_t", (4, 128), (8, 0))
    assert len({kernel.symbol for kernel in kernels}) == len(kernels)
    names = " ".join(kernel.symbol for kernel in kernels)
    for expected in ("compress_half_uint8_t_128", "score_fine_of_token", "score_fine_half", "select", "argmax"):
        assert expected in names
    for expected in ("gemv_half_8_0_4_float", "gemm_half_4_128_16", "gemm_half_4_128_64", "gemv_half_4_128_8_half"):
        assert expected in names
    assert "uint8_t" not in " ".join(k.symbol for k in kernels_for(config, "half", "half", None, None))
