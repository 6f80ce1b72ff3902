"""`edge doctor` on recorded machines: what it finds, how bad it is, and whether the command it names mends it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.cuda import CudaError
from edge.doctor import jetson, probe
from edge.doctor.finding import version_of
from edge.doctor.machine import COMMANDS, PROBES, Output, cache_root, probe_command, run_command
from edge.doctor.report import diagnose, remedies, terminal, to_values
from edge.doctor.software import PYTHONS
from plugins.build.cache import cache_folder
from tests.command import edge
from tests.doctor_faults import FAULTS, JETSON_FAULTS, closed_venv
from tests.doctor_samples import (
    NO_RTX,
    NO_TENSORRT,
    PLAIN,
    agx_jetpack_5,
    agx_jetpack_7,
    by_name,
    meminfo,
    nano_jetpack_6,
    plain_pc,
    rtx_pc,
)
from tests.emulated import emulated_gpu

ROOT = Path(__file__).parent.parent

MACHINES = {
    "Orin Nano, JetPack 6.2": (nano_jetpack_6, "jetson"),
    "AGX Orin, JetPack 7.2": (agx_jetpack_7, "jetson"),
    "RTX PC": (rtx_pc, "rtx"),
    "plain PC": (plain_pc, "onnxruntime"),
}


@pytest.mark.parametrize("name", MACHINES)
def test_a_healthy_machine_has_nothing_to_mend(name: str, tmp_path: Path) -> None:
    recorded, target = MACHINES[name]
    diagnosis = diagnose(recorded().machine(tmp_path))
    assert diagnosis.target == target
    assert [f for f in diagnosis.findings if f.status in ("warning", "problem") or f.remedy] == []
    assert diagnosis.healthy


def test_what_is_seen_of_a_board(tmp_path: Path) -> None:
    found = {name: f.found for name, f in by_name(diagnose(nano_jetpack_6().machine(tmp_path))).items()}
    assert found["board"] == "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super, aarch64, tegra234"
    assert found["JetPack"] == "JetPack 6.2 (L4T R36.4.3)"
    assert found["GPU"] == "Orin, sm_87, 8 SMs"
    assert found["driver"] == "CUDA 12.6"
    assert found["TensorRT"] == "TensorRT 10.3.0"
    assert found["CMA"] == "960 MiB"
    assert found["power mode"] == "MAXN_SUPER (mode 2)"
    assert found["clocks"] == "GPU 1020 of 1020 MHz, locked"
    assert found["temperature"] == "50 °C (tj)"
    assert found["power supply"] == "37 short peaks of current since boot"
    seven = {name: f.found for name, f in by_name(diagnose(agx_jetpack_7().machine(tmp_path))).items()}
    assert seven["JetPack"] == "JetPack 7.2 (L4T R39.2.0)"
    assert seven["clocks"] == "GPU 1020 of 1020 MHz, memory 3199 of 3199 MHz, locked"


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_found_and_mended(case: str, tmp_path: Path) -> None:
    healthy, spoil, name, status, found, remedy = FAULTS[case]
    recorded = healthy()
    spoil(recorded)
    diagnosis = diagnose(recorded.machine(tmp_path))
    finding = by_name(diagnosis)[name]
    assert finding.status == status
    assert re.search(found, finding.found), finding.found
    assert re.search(remedy, finding.remedy), finding.remedy
    assert diagnosis.healthy == (status != "problem")
    assert all(f.remedy for f in diagnosis.findings if f.status in ("warning", "problem"))


def test_jetpack_5_is_refused_with_its_reason(tmp_path: Path) -> None:
    found = by_name(diagnose(agx_jetpack_5().machine(tmp_path)))
    assert found["JetPack"].status == "problem"
    assert found["JetPack"].found.startswith("JetPack 5 (L4T R35.4.1): unsupported, its TensorRT 8 has no IPluginV3")
    assert [name for name, finding in found.items() if finding.remedy] == ["JetPack"]  # the rest comes with it


def test_a_pc_with_desktop_tensorrt_is_one_for_it(tmp_path: Path) -> None:
    recorded = rtx_pc()
    recorded.answers |= {"tensorrt_rtx": NO_RTX, "tensorrt": {"version": "10.14.1"}}
    diagnosis = diagnose(recorded.machine(tmp_path))
    assert (diagnosis.target, diagnosis.healthy) == ("tensorrt", True)


def test_a_gpu_is_told_from_other_devices_of_its_maker(tmp_path: Path) -> None:
    recorded, sound = plain_pc(), "sys/bus/pci/devices/0000:01:00.1"
    recorded.files |= {f"{sound}/vendor": "0x10de\n", f"{sound}/class": "0x040300\n"}
    assert diagnose(recorded.machine(tmp_path)).target == "onnxruntime"
    recorded.files[f"{sound}/class"] = "0x030200\n"  # a 3D controller, as in laptops
    assert diagnose(recorded.machine(tmp_path)).target == "rtx"


# Remedies that a shell on this machine can carry out on a copy of the file are carried out.
def test_the_remedy_for_a_closed_venv_opens_it(tmp_path: Path) -> None:
    recorded, config = nano_jetpack_6(), tmp_path / "pyvenv.cfg"
    config.write_text("home = /usr/bin\ninclude-system-site-packages = false\nversion = 3.10.12\n")
    recorded.answers["tensorrt"] = NO_TENSORRT
    recorded.fields |= {"venv": str(config), "files": {str(config): config.read_text()}}
    subprocess.run(by_name(diagnose(recorded.machine(tmp_path)))["TensorRT"].remedy, shell=True, check=True)
    assert config.read_text() == "home = /usr/bin\ninclude-system-site-packages = true\nversion = 3.10.12\n"


@pytest.mark.parametrize("old", ["", " cma=256M"])
def test_the_remedy_for_a_small_cma_edits_the_boot_entry(old: str, tmp_path: Path) -> None:
    recorded, entry = nano_jetpack_6(), tmp_path / "extlinux.conf"
    recorded.files["proc/meminfo"] = meminfo(7990 << 20, cma=256 << 20)
    remedy = by_name(diagnose(recorded.machine(tmp_path)))["CMA"].remedy
    text = "LABEL primary\n      LINUX /boot/Image\n      APPEND ${{cbootargs}} rw{} rootwait{}\n#     APPEND old\n"
    entry.write_text(text.format(old, ""))
    command = remedy.replace("sudo ", "").replace("/boot/extlinux/extlinux.conf", str(entry)).split(" && ")[0]
    for _ in range(2):  # once more changes nothing
        subprocess.run(command, shell=True, check=True)
        assert entry.read_text() == text.format("", " cma=950M")


@given(
    st.tuples(*[st.integers(0, 99)] * 3), st.sampled_from(["\n", ", GCID: 1, BOARD: generic\n# KERNEL_VARIANT: oot"])
)
@settings(max_examples=50)
def test_any_release_is_read(numbers: tuple[int, int, int], end: str) -> None:
    text = f"# R{numbers[0]} (release), REVISION: {numbers[1]}.{numbers[2]}{end}"
    machine = replace(PLAIN, files={"/etc/nv_tegra_release": text})
    assert jetson.release(machine) == numbers
    assert f"L4T R{numbers[0]}.{numbers[1]}.{numbers[2]}" in jetson.jetpack(numbers)


@given(st.permutations(["7W", "15W", "25W", "40W", "MAXN", "MAXN_SUPER"]), st.integers(1, 6))
@settings(max_examples=50)
def test_the_fastest_mode_goes_by_name_not_by_number(names: list[str], count: int) -> None:
    conf = "\n".join(f"< POWER_MODEL ID={i} NAME={name} >" for i, name in enumerate(names[:count]))
    modes = jetson.power_modes(replace(PLAIN, files={"/etc/nvpmodel.conf": conf}))
    assert [mode.name for mode in modes] == names[:count]
    order = ["7W", "15W", "25W", "40W", "MAXN", "MAXN_SUPER"]
    assert max(modes, key=lambda mode: mode.rank).name == max(names[:count], key=order.index)


@given(st.dictionaries(st.sampled_from(sorted(nano_jetpack_6().files)), st.text(max_size=40)), st.text(max_size=40))
@settings(max_examples=60)
def test_nonsense_in_files_ends_nothing(files: dict[str, str], said: str) -> None:
    recorded = nano_jetpack_6()
    answers = {name: Output(0, json.dumps(answer)) for name, answer in recorded.answers.items() if name in PROBES}
    machine = replace(
        PLAIN,
        files={f"/{name}": text for name, text in {**recorded.files, **files}.items()},
        outputs={**{name: Output(0, said) for name in COMMANDS}, **answers},
    )
    json.dumps(to_values(diagnose(machine)))


def test_clocks_of_jetpack_6_for_root() -> None:
    """debugfs: locked is what `jetson_clocks` overrides, while the minimum stays low."""
    emc = "/sys/kernel/debug/bpmp/debug/clk/emc"
    files = {f"{emc}/rate": "3199000000", f"{emc}/max_rate": "3199000000", f"{emc}/mrq_rate_locked": "1"}
    assert jetson.clocks(replace(PLAIN, files=files)) == {"memory": jetson.Clock(3199000000, 3199000000, locked=True)}


@pytest.mark.parametrize(("text", "version"), [("10.16.2.10-1+cuda13", (10, 16, 2, 10)), ("580", (580,)), ("N/A", ())])
def test_versions(text: str, version: tuple[int, ...]) -> None:
    assert version_of(text) == version


def test_a_command_that_hangs_or_is_missing_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge.doctor.machine.TIMEOUT", 0.2)
    assert run_command(["sleep", "30"]) == Output(None, "")
    assert run_command(["no-such-program-anywhere"]) == Output(None, "")
    assert run_command([sys.executable, "-c", "import os; os.kill(os.getpid(), 11)"]).code == -11


def test_the_gpu_is_what_edge_cuda_says(tmp_path: Path) -> None:
    """The emulated driver's Orin, through edge.cuda, the probe and JSON, to the findings."""
    recorded = agx_jetpack_7()
    with emulated_gpu("sm_87"):
        recorded.answers["gpu"] = probe.gpu()
    diagnosis = diagnose(recorded.machine(tmp_path))
    found = by_name(diagnosis)
    assert (found["GPU"].status, found["GPU"].found) == ("ok", "Emulated Jetson (sm_87), sm_87, 16 SMs")
    assert "GPU memory" not in found  # it shares the board's
    assert found["driver"].found.startswith("CUDA ")
    gpu = to_values(diagnosis)["machine"]["gpu"]
    assert gpu["is_integrated"]
    assert 0 < gpu["free_memory"] <= gpu["total_memory"]


def test_what_a_driver_refuses_is_told_with_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise CudaError("cuInit failed", "CUDA_ERROR_NO_DEVICE")

    monkeypatch.setattr("edge.cuda.open_device", refuse)
    assert {"error": "cuInit failed", "code": "CUDA_ERROR_NO_DEVICE"}.items() <= probe.gpu().items()


def test_probes_answer_in_a_process_of_their_own() -> None:
    """Here for real; without a driver the GPU's is an error with a code, never a crash."""
    gpu = json.loads(run_command(probe_command("gpu")).text.strip().splitlines()[-1])
    assert "name" in gpu or gpu["code"]
    rtx = json.loads(run_command(probe_command("tensorrt_rtx")).text.strip().splitlines()[-1])
    assert version_of(rtx["version"]) >= (1, 2)


def test_the_python_limits_and_the_cache_are_those_of_the_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (low, high) = PYTHONS
    limits = f'requires-python = ">={low[0]}.{low[1]},<{high[0]}.{high[1] + 1}"'
    assert limits in (ROOT / "pyproject.toml").read_text()
    for name in ("XDG_CACHE_HOME", "EDGE_CACHE"):  # the second one wins
        monkeypatch.setenv(name, str(tmp_path / name))
        assert cache_root() == cache_folder("x").parent
        assert cache_root().is_relative_to(tmp_path / name)


def test_json_names_neither_person_nor_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    recorded = nano_jetpack_6()
    closed_venv(recorded)
    config = "/home/ada/venv/pyvenv.cfg"
    recorded.fields |= {"venv": config, "files": {config: "include-system-site-packages = false"}}
    recorded.fields["cache"] = Path("/home/ada/.cache/minicpm-edge")
    text = json.dumps(to_values(diagnose(recorded.machine(tmp_path))))
    assert "~/venv/pyvenv.cfg" in text
    assert "ada" not in text
    values = json.loads(text)
    assert values["machine"]["power_mode"] == "MAXN_SUPER"
    assert values["machine"]["clocks"]["GPU"] == {"current": 1020000000, "maximum": 1020000000, "locked": True}
    assert values["machine"]["gpu"]["architecture"] == "sm_87"


@pytest.mark.parametrize("width", [80, 60])
def test_the_table_fits_and_commands_stay_whole(width: int, tmp_path: Path) -> None:
    from rich.console import Console

    recorded = nano_jetpack_6()
    for _, (spoil, *_) in sorted(JETSON_FAULTS.items()):
        spoil(recorded)
    diagnosis = diagnose(recorded.machine(tmp_path))
    console = Console(width=width, soft_wrap=True, highlight=False)
    with console.capture() as table:
        console.print(terminal(diagnosis), soft_wrap=False)
    assert max(map(len, table.get().splitlines())) <= width
    with console.capture() as captured:
        console.print(remedies(diagnosis))
    lines = captured.get().splitlines()
    assert all(f"  {finding.remedy}" in lines for finding in diagnosis.findings if finding.remedy)


def test_the_command_here(tiny_bundle: Path) -> None:
    """On whatever runs the tests: the words, the JSON and the exit code agree, and nothing is written."""
    before = sorted(tiny_bundle.iterdir())
    table = edge("doctor", tiny_bundle, NO_COLOR="1")
    values = json.loads(edge("doctor", tiny_bundle, "--json").stdout)
    problems = [f for f in values["findings"] if f["status"] == "problem"]
    assert table.returncode == (1 if problems else 0)
    assert values["healthy"] == (not problems)
    assert values["target"] == "onnxruntime"
    text = table.stdout.decode()
    assert "\x1b" not in text
    assert all(finding["name"] in text for finding in values["findings"])
    assert sorted(tiny_bundle.iterdir()) == before
    assert edge("doctor", "/nowhere").returncode == 2


@pytest.mark.parametrize("columns", ["80", "40"])
def test_help_fits_the_terminal(columns: str) -> None:
    result = edge("doctor", "--help", COLUMNS=columns, NO_COLOR="1", TERM="dumb")
    text = result.stdout.decode()
    assert max(map(len, text.splitlines())) <= int(columns)
    assert "edge doctor bundle" in text.split("Usage:")[1].split("\n", 1)[1]


def test_it_leaves_no_trace(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("XDG_CACHE_HOME", "EDGE_CACHE")}
    command = [sys.executable, "-m", "edge", "doctor", "--json"]
    result = subprocess.run(command, cwd=ROOT, env={**environment, "HOME": str(tmp_path)}, capture_output=True)
    assert json.loads(result.stdout)["findings"]
    assert list(tmp_path.iterdir()) == []
