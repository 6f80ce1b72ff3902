"""Hashes and the power mode by which reports are told apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge.bench import identity
from edge.bench.identity import NO_POWER_MODE, identify, power_mode, sources_hash
from edge.bundle import hash_file
from edge.doctor.machine import Output
from edge.engine import open_engine
from edge.plan import EngineOptions
from plugins.ort.library import find_library


def test_a_bundle_is_known_by_its_files(tiny_bundle: Path) -> None:
    engine = open_engine(tiny_bundle, EngineOptions(context=64, threads=1))
    found = identify(engine)
    assert found.bundle == engine.bundle.manifest.key
    assert found.files == {name: hash_file(tiny_bundle / name) for name in engine.bundle.manifest.files}
    library = find_library()
    assert found.operators == ("" if library is None else hash_file(library))
    assert found.engine == {} and len(found.plugins) == len(found.sources) == 64


def test_sources_have_one_hash_and_any_change_another(tmp_path: Path) -> None:
    package = tmp_path / "package"
    (package / "inner").mkdir(parents=True)
    (package / "a.py").write_text("1")
    (package / "inner" / "k.cu").write_text("2")
    (package / "notes.txt").write_text("x")
    first = sources_hash([package])
    (package / "notes.txt").write_text("y")
    assert sources_hash([package]) == first
    (package / "inner" / "k.cu").write_text("3")
    second = sources_hash([package])
    (package / "inner" / "k.cu").rename(package / "inner" / "j.cu")
    assert len({first, second, sources_hash([package])}) == 3


@pytest.mark.parametrize(
    ("files", "said", "mode"),
    [
        ({}, "", NO_POWER_MODE),
        ({"etc/nv_tegra_release": "# R36 (release), REVISION: 4.3"}, "NV Power Mode: MAXN\n0\n", "MAXN"),
        (
            {
                "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3",
                "etc/nvpmodel.conf": "< POWER_MODEL ID=2 NAME=MODE_30W >",
                "var/lib/nvpmodel/status": "pmode:0002",
            },
            "",
            "MODE_30W",
        ),
        ({"etc/nv_tegra_release": "# R36 (release), REVISION: 4.3"}, "", "unknown"),
    ],
)
def test_the_power_mode_is_nvpmodels(
    files: dict[str, str], said: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(identity, "run_command", lambda command: Output(0 if said else None, said))
    assert power_mode(tmp_path) == mode
