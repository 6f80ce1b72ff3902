"""Sensors in sysfs, on trees as boards and PCs have them, and NVML, called for real in a library compiled for it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.telemetry.heat import open_cpufreq, open_devfreq, open_throttling, open_zones
from edge.telemetry.nvml import open_nvml
from edge.telemetry.rails import open_iio, open_input, open_rails
from edge.telemetry.rapl import growth, open_rapl
from edge.telemetry.reading import Unreadable
from edge.telemetry.recording import choose_total
from tests.telemetry_samples import AGX_ORIN, ina3221, tree

# ---- rails -------------------------------------------------------------------------------------------------


def test_rails_are_voltage_times_current_and_follow_the_files(tmp_path: Path) -> None:
    source = open_rails(tree(tmp_path, AGX_ORIN))
    expected = {"VDD_GPU_SOC": 12.0, "VDD_CPU_CV": 2.0, "VIN_SYS_5V0": 4.5, "VDDQ_VDD2_1V8AO": 0.3}
    assert source.read() == pytest.approx({("power", rail): watts for rail, watts in expected.items()})
    (tmp_path / "sys/class/hwmon/hwmon1/curr1_input").write_text("1500\n")
    reading = source.read()
    assert reading["power", "VDD_GPU_SOC"] == pytest.approx(30.0)
    total = choose_total(list(reading))
    assert sum(reading[part] for part in total.parts) == pytest.approx(36.5), "DRAM's rail is behind VIN_SYS_5V0"
    assert total.scope == "VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0, the rails of the module"
    source.close()


def test_a_rail_that_does_not_answer_is_left_out(tmp_path: Path) -> None:
    source = open_rails(tree(tmp_path, ina3221(0, ("VDD_IN", 5000, 1000), ("VDD_SOC", 5000, 300))))
    (tmp_path / "sys/class/hwmon/hwmon0/curr2_input").write_text("")
    assert source.read() == {("power", "VDD_IN"): 5.0}
    source.close()


def test_the_input_of_a_thor_is_an_ina238_in_microwatts(tmp_path: Path) -> None:
    files = {"sys/class/hwmon/hwmon5/name": "ina238", "sys/class/hwmon/hwmon5/power1_input": 26686000}
    assert open_input(tree(tmp_path, files)).read() == pytest.approx({("power", "VIN"): 26.686})


def test_rails_of_jetpack_4(tmp_path: Path) -> None:
    folder = "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0"
    files = {f"{folder}/rail_name_0": "POM_5V_IN", f"{folder}/in_power0_input": 1750, f"{folder}/rail_name_1": "NC"}
    assert open_iio(tree(tmp_path, files)).read() == pytest.approx({("power", "POM_5V_IN"): 1.75})


@pytest.mark.parametrize(
    ("opened", "said"),
    [
        (open_rails, "no INA3221 or INA238 in /sys/class/hwmon"),
        (open_rapl, "no RAPL counters in /sys/class/powercap"),
        (open_cpufreq, "no cpufreq in /sys/devices/system/cpu"),
        (open_zones, "no thermal zone in /sys/class/thermal"),
        (open_devfreq, "no GPU in /sys/class/devfreq"),
        (open_throttling, "no cooling device"),
    ],
)
def test_a_machine_without_sensors_says_which_are_missing(opened: type, said: str, tmp_path: Path) -> None:
    with pytest.raises(Unreadable, match=said):
        opened(tmp_path)


# ---- RAPL --------------------------------------------------------------------------------------------------

RAPL = {
    "sys/class/powercap/intel-rapl:0/name": "package-0",
    "sys/class/powercap/intel-rapl:0/energy_uj": 262143000000,
    "sys/class/powercap/intel-rapl:0/max_energy_range_uj": 262143328850,
    "sys/class/powercap/intel-rapl:0:0/name": "core",
    "sys/class/powercap/intel-rapl:0:0/energy_uj": 5,
    "sys/class/powercap/intel-rapl:0:0/max_energy_range_uj": 262143328850,
    "sys/class/powercap/intel-rapl:0:1/name": "dram",
    "sys/class/powercap/intel-rapl:0:1/energy_uj": 7,
    "sys/class/powercap/intel-rapl:0:1/max_energy_range_uj": 65712999613,
    "sys/class/powercap/intel-rapl:1/name": "psys",
    "sys/class/powercap/intel-rapl:1/energy_uj": 9,
    "sys/class/powercap/intel-rapl:1/max_energy_range_uj": 262143328850,
}


def test_rapl_counts_on_where_its_counter_starts_again(tmp_path: Path) -> None:
    source = open_rapl(tree(tmp_path, RAPL))
    counter = tmp_path / "sys/class/powercap/intel-rapl:0/energy_uj"
    seen = [source.read()["energy", "package-0"]]
    for value in (262143300000, 1000, 2001000):
        counter.write_text(f"{value}\n")
        seen.append(source.read()["energy", "package-0"])
    assert seen == pytest.approx([0, 0.3, 0.329850, 2.32985])
    total = choose_total(list(source.read()))
    assert total.parts == (("energy", "package-0"), ("energy", "package-0 dram")), "cores are in the package"
    source.close()


@given(st.integers(1, 10**12).flatmap(lambda span: st.tuples(st.just(span), st.lists(st.integers(0, span - 1)))))
def test_a_counter_that_wraps_loses_nothing(case: tuple[int, list[int]]) -> None:
    """Steps shorter than the span, as a counter modulo it shows them, add up to their sum."""
    span, steps = case
    true, shown, total = 0, 0, 0
    for step in steps:
        true += step
        total += growth(shown, true % span, span)
        shown = true % span
    assert total == true


def test_counters_that_may_not_be_read_are_refused_with_their_name(tmp_path: Path) -> None:
    root = tree(tmp_path, RAPL)
    for counter in root.glob("sys/class/powercap/*/energy_uj"):
        counter.unlink()
        counter.symlink_to(counter)  # may not be opened by anybody, not even by root
    with pytest.raises(Unreadable, match="/sys/class/powercap/intel-rapl:0:1/energy_uj: Too many levels"):
        open_rapl(root)


# ---- clocks, heat, throttling ------------------------------------------------------------------------------


def test_clocks_of_gpu_memory_and_the_fastest_core(tmp_path: Path) -> None:
    root = tree(tmp_path, AGX_ORIN)
    assert open_devfreq(root).read() == {("clock", "GPU"): 1300500000}
    assert open_cpufreq(root).read() == pytest.approx({("clock", "CPU"): 2201.6e6})
    tree(tmp_path, {"sys/kernel/debug/bpmp/debug/clk/emc/rate": 3199000000})  # root, JetPack 6
    assert open_devfreq(root).read()["clock", "memory"] == 3199e6
    tree(tmp_path, {"sys/class/devfreq/bwmgr/cur_freq": 2133000000})  # JetPack 7
    assert open_devfreq(root).read()["clock", "memory"] == 2133e6


def test_zones_whose_unit_is_off_are_left_out(tmp_path: Path) -> None:
    pmic = {"sys/class/thermal/thermal_zone9/type": "PMIC-Die", "sys/class/thermal/thermal_zone9/temp": 100000}
    twice = {"sys/class/thermal/thermal_zone10/type": "tj-thermal", "sys/class/thermal/thermal_zone10/temp": 51000}
    off = {"sys/class/thermal/thermal_zone5/type": "cv1-thermal", "sys/class/thermal/thermal_zone5/temp": -256000}
    source = open_zones(tree(tmp_path, {**AGX_ORIN, **pmic, **twice, **off}))
    assert source.read() == pytest.approx(
        {("temperature", "cpu"): 49.468, ("temperature", "tj"): 50.125, ("temperature", "tj 10"): 51.0}
    )
    source.close()


def test_throttling_of_a_board_is_states_and_events_but_no_fan(tmp_path: Path) -> None:
    source = open_throttling(tree(tmp_path, AGX_ORIN))
    assert source.read() == {("throttle", "gpu-throttle-alert"): 0, ("events", "over-current oc3"): 37}
    tree(tmp_path, {"sys/class/thermal/cooling_device1/cur_state": 1, "sys/class/hwmon/hwmon3/oc3_event_cnt": 41})
    assert source.read() == {("throttle", "gpu-throttle-alert"): 1, ("events", "over-current oc3"): 41}
    source.close()


def test_throttling_of_a_pc_counts_cores_once(tmp_path: Path) -> None:
    """Four logical CPUs of two cores and one package; an idle clamp shows -1, a TCC offset is no throttling."""
    files: dict[str, object] = {
        "sys/class/thermal/cooling_device0/type": "Processor",
        "sys/class/thermal/cooling_device0/cur_state": -1,
        "sys/class/thermal/cooling_device1/type": "TCC Offset",
        "sys/class/thermal/cooling_device1/cur_state": 3,
    }
    for cpu in range(4):
        folder = f"sys/devices/system/cpu/cpu{cpu}"
        files |= {
            f"{folder}/topology/core_id": cpu // 2,
            f"{folder}/topology/physical_package_id": 0,
            f"{folder}/thermal_throttle/core_throttle_count": 10 * (cpu // 2 + 1),
            f"{folder}/thermal_throttle/package_throttle_count": 100,
        }
    reading = open_throttling(tree(tmp_path, files)).read()
    expected = {("throttle", "Processor"): 0, ("events", "CPU core heat"): 30, ("events", "CPU package heat"): 100}
    assert reading == expected


# ---- NVML --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("nvml") / "libfake.so"
    source = Path(__file__).with_name("fake_nvml.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(path), str(source)], check=True)
    return str(path)


def test_nvml_reads_cudas_first_gpu(library: str) -> None:
    source = open_nvml(library, library)
    assert source.name == "NVML (NVIDIA GeForce RTX 4090)"
    first, second = source.read(), source.read()
    assert second["energy", "GPU board"] - first["energy", "GPU board"] == pytest.approx(40.25)
    assert ("power", "GPU board") not in first, "the counter is exact, power a mean over a second"
    assert first["clock", "GPU"] == 2520e6 and first["clock", "memory"] == 10501e6
    assert first["temperature", "GPU"] == 71
    active = {name for (quantity, name), value in first.items() if quantity == "throttle" and value}
    assert active == {"GPU: power limit (software)", "GPU: temperature (hardware)"}, "a clock that was set is none"
    source.close()


def test_nvml_without_cuda_takes_its_own_first_gpu(library: str) -> None:
    source = open_nvml(library, "libmissing.so")
    assert source.name == "NVML (GPU of the display)"
    assert not any(value for (quantity, _), value in source.read().items() if quantity == "throttle"), (
        "idle is no reason"
    )


def test_nvml_of_an_old_gpu_gives_power(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_NVML", "old")
    reading = open_nvml(library, library).read()
    assert reading["power", "GPU board"] == pytest.approx(402.5) and ("energy", "GPU board") not in reading
    assert choose_total(list(reading)).scope == "GPU board, not the rest of the machine"


@pytest.mark.parametrize(("state", "said"), [("refuse", "NVML: Insufficient Permissions"), ("none", "NVML: no GPU")])
def test_nvml_that_refuses_says_why(library: str, state: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_NVML", state)
    with pytest.raises(Unreadable, match=said):
        open_nvml(library, library)
    with pytest.raises(Unreadable, match=r"no NVIDIA driver \(libmissing.so\)"):
        open_nvml("libmissing.so")
