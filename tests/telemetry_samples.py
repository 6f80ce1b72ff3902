"""Recorded lines of tegrastats, trees of sysfs as boards have them, and a report with power: for tests of sensors."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edge.bench.report import Report
from edge.telemetry.figures import CaseTelemetry, Run, Telemetry
from edge.telemetry.reading import Key, Reading
from edge.telemetry.recorder import Recorder
from edge.telemetry.sampler import Sampler
from tests.bench_samples import sample_report

# Each line as somebody published it, with what it says: (line, watts by rail, MHz by unit, °C by zone).
Line = tuple[str, dict[str, float], dict[str, float], dict[str, float]]
LINES: dict[str, Line] = {
    # github.com/martinkersner/gtop/pull/7, AGX Xavier, JetPack 4.2: rails without a unit
    "AGX Xavier, JetPack 4": (
        "RAM 14700/15692MB (lfb 3x2MB) SWAP 898/8192MB (cached 23MB) CPU [0%@1190,0%@1190,0%@1190,0%@1190,0%@1190,"
        "0%@1190,0%@1190,0%@1190] EMC_FREQ 0% GR3D_FREQ 0% AO@30C GPU@30.5C Tboard@31C Tdiode@32C AUX@30.5C CPU@31.5C "
        "thermal@30.8C PMIC@100C GPU 463/463 CPU 618/618 SOC 2936/2936 CV 0/0 VDDRQ 309/309 SYS5V 3306/3306",
        {"GPU": 0.463, "CPU": 0.618, "SOC": 2.936, "CV": 0.0, "VDDRQ": 0.309, "SYS5V": 3.306},
        {"CPU": 1190},
        {"ao": 30, "gpu": 30.5, "tboard": 31, "tdiode": 32, "aux": 30.5, "cpu": 31.5, "thermal": 30.8},
    ),
    # a public Prometheus exporter's test "XavierNXJetPack512", Xavier NX, JetPack 5.1.2
    "Xavier NX, JetPack 5": (
        "07-09-2024 13:31:31 RAM 3168/6851MB (lfb 2x4MB) SWAP 161/3426MB (cached 0MB) CPU [23%@1397,17%@1192,16%@1190,"
        "13%@1190,23%@1190,10%@1190] EMC_FREQ 2%@204 GR3D_FREQ 0%@[114] VIC_FREQ 115 APE 150 AUX@45C CPU@46.5C "
        "thermal@45.6C AO@45C GPU@45.5C PMIC@50C VDD_IN 2763mW/2846mW VDD_CPU_GPU_CV 650mW/670mW VDD_SOC 650mW/711mW",
        {"VDD_IN": 2.763, "VDD_CPU_GPU_CV": 0.65, "VDD_SOC": 0.65},
        {"CPU": 1397, "memory": 204, "GPU": 114},
        {"aux": 45, "cpu": 46.5, "thermal": 45.6, "ao": 45, "gpu": 45.5},
    ),
    # a public guide for llama.cpp on AGX Orin ("catid@orin:~$ sudo tegrastats"), JetPack 5.1: two GPU clocks, units off
    "AGX Orin, JetPack 5": (
        "04-24-2023 00:01:24 RAM 1282/62795MB (lfb 15152x4MB) SWAP 0/31398MB (cached 0MB) CPU [0%@729,0%@729,0%@729,"
        "0%@729,0%@729,0%@729,0%@729,0%@729,0%@729,0%@729,0%@729,0%@729] EMC_FREQ 0%@2133 GR3D_FREQ 0%@0 GR3D2_FREQ "
        "0%@0 VIC_FREQ 729 APE 174 CV0@-256C CPU@42.593C Tboard@32C SOC2@39.343C Tdiode@33.25C SOC0@39.375C CV1@-256C "
        "GPU@-256C tj@42.593C SOC1@40.468C CV2@-256C VDD_GPU_SOC 2399mW/2399mW VDD_CPU_CV 400mW/400mW VIN_SYS_5V0 "
        "4032mW/4032mW NC 0mW/0mW VDDQ_VDD2_1V8AO 301mW/301mW NC 0mW/0mW",
        {"VDD_GPU_SOC": 2.399, "VDD_CPU_CV": 0.4, "VIN_SYS_5V0": 4.032, "VDDQ_VDD2_1V8AO": 0.301},
        {"CPU": 729, "memory": 2133},
        {"cpu": 42.593, "tboard": 32, "soc2": 39.343, "tdiode": 33.25, "soc0": 39.375, "tj": 42.593, "soc1": 40.468},
    ),
    # github.com/lesomnus/tegra-exporter, test of its parser, AGX Orin, L4T 36.4.4
    "AGX Orin, JetPack 6": (
        "05-09-2026 18:42:07 RAM 18202/62841MB (lfb 466x4MB) SWAP 86/31420MB (cached 0MB) CPU [16%@1949,6%@1761,4%@1222,"
        "4%@2201,4%@1036,33%@1036,0%@1036,40%@1036,3%@1190,46%@1190,6%@1190,2%@1190] EMC_FREQ 3%@2133 GR3D_FREQ 0%@[0,0] "
        "NVENC 78%@166 NVDEC off NVJPG off NVJPG1 off VIC 32%@115 OFA off NVDLA0 off NVDLA1 off PVA0_FREQ off APE 174 "
        "cpu@52.343C soc2@48.343C soc0@49.062C tj@52.343C soc1@49.531C VDD_GPU_SOC 2412mW/2412mW VDD_CPU_CV 1607mW/1607mW "
        "VIN_SYS_5V0 4607mW/4657mW",
        {"VDD_GPU_SOC": 2.412, "VDD_CPU_CV": 1.607, "VIN_SYS_5V0": 4.607},
        {"CPU": 2201, "memory": 2133},
        {"cpu": 52.343, "soc2": 48.343, "soc0": 49.062, "tj": 52.343, "soc1": 49.531},
    ),
    # a public benchmark's test of its summary, Orin Nano Developer Kit, L4T 36: under load
    "Orin Nano, JetPack 6": (
        "10-08-2026 04:38:21 RAM 1343/7620MB (lfb 157x4MB) SWAP 165/3810MB (cached 3MB) CPU [0%@1497,0%@729,0%@729,"
        "0%@729,0%@729,0%@729] EMC_FREQ 15%@204 GR3D_FREQ 0%@[305] NVDEC off NVJPG off VIC off OFA off APE 200 "
        "cpu@48.562C soc2@46.593C soc0@48.625C gpu@49.625C tj@49.312C soc1@47.937C VDD_IN 5251mW/8535mW "
        "VDD_CPU_GPU_CV 512mW/1944mW VDD_SOC 2720mW/3659mW",
        {"VDD_IN": 5.251, "VDD_CPU_GPU_CV": 0.512, "VDD_SOC": 2.72},
        {"CPU": 1497, "memory": 204, "GPU": 305},
        {"cpu": 48.562, "soc2": 46.593, "soc0": 48.625, "gpu": 49.625, "tj": 49.312, "soc1": 47.937},
    ),
    # a public test of a telemetry parser, a line of its own Orin NX 16GB, JetPack 6.2: not root, so without clocks
    "Orin NX, JetPack 6": (
        "07-16-2026 13:03:45 RAM 1224/15656MB (lfb 8x4MB) SWAP 0/7828MB (cached 0MB) CPU [1%@729,0%@729,0%@729,0%@729,"
        "0%@729,0%@729,0%@729,0%@729] GR3D_FREQ 0% cv0@41.156C cpu@45.843C soc2@39.593C soc0@42.562C cv1@42.156C "
        "gpu@43.406C tj@45.843C soc1@40.25C cv2@38.593C VDD_IN 4304mW/4304mW VDD_CPU_GPU_CV 573mW/573mW VDD_SOC "
        "1218mW/1218mW",
        {"VDD_IN": 4.304, "VDD_CPU_GPU_CV": 0.573, "VDD_SOC": 1.218},
        {"CPU": 729},
        {"cv0": 41.156, "cpu": 45.843, "soc2": 39.593, "soc0": 42.562, "cv1": 42.156, "gpu": 43.406, "tj": 45.843,
         "soc1": 40.25, "cv2": 38.593},
    ),
    # github.com/lesomnus/tegra-exporter, AGX Thor, L4T 38.4 (JetPack 7.1): three GPU clocks, no load
    "AGX Thor, JetPack 7": (
        "05-17-2026 10:00:33 RAM 4280/125773MB (lfb 29x4MB) SWAP 0/2048MB (cached 0MB) CPU [0%@972,0%@972,0%@972,0%@972,"
        "1%@972,0%@972,1%@972,0%@972,0%@2601,17%@2601,1%@972,9%@972,0%@972,1%@972] EMC_FREQ 0%@665 GR3D_FREQ @[0,0,0] "
        "NVENC0_FREQ @0 NVENC1_FREQ @0 NVDEC0_FREQ @0 NVDEC1_FREQ @0 NVJPG0_FREQ @0 VIC off OFA_FREQ @0 PVA0_FREQ off "
        "APE 300 cpu@35.25C tj@36.031C soc012@36.062C soc345@34.5C VDD_GPU 0mW/0mW VDD_CPU_SOC_MSS 4923mW/4544mW "
        "VIN_SYS_5V0 4327mW/4227mW",
        {"VDD_GPU": 0.0, "VDD_CPU_SOC_MSS": 4.923, "VIN_SYS_5V0": 4.327},
        {"CPU": 2601, "memory": 665},
        {"cpu": 35.25, "tj": 36.031, "soc012": 36.062, "soc345": 34.5},
    ),
    # NVIDIA's own tegrastats_exporter (Apache-2.0), its test's "current Thor format": cores off, the input's power
    "AGX Thor with VIN, JetPack 7": (
        "07-31-2026 14:45:55 RAM 86905/125772MB (lfb 368x4MB) CPU [12%@972,10%@972,off,33%@1890] cpu@39.812C tj@39.906C "
        "soc012@38.812C gpu@39.906C soc345@38.625C VDD_GPU 3561mW/3561mW VDD_CPU_SOC_MSS 7910mW/7910mW VIN_SYS_5V0 "
        "7620mW/7620mW VIN 26686mW/26686mW",
        {"VDD_GPU": 3.561, "VDD_CPU_SOC_MSS": 7.91, "VIN_SYS_5V0": 7.62, "VIN": 26.686},
        {"CPU": 1890},
        {"cpu": 39.812, "tj": 39.906, "soc012": 38.812, "gpu": 39.906, "soc345": 38.625},
    ),
}  # fmt: skip
# ruff: noqa: E501


def tree(root: Path, files: Mapping[str, object]) -> Path:
    """Write files below a root, one line each."""
    for name, value in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")
    return root


def ina3221(number: int, *channels: tuple[str, int, int]) -> dict[str, object]:
    """The files of one monitor: label, mV and mA of each channel; and the sums that are no rails."""
    folder = f"sys/class/hwmon/hwmon{number}"
    files: dict[str, object] = {f"{folder}/name": "ina3221"}
    for index, (label, millivolts, milliamperes) in enumerate(channels, start=1):
        files[f"{folder}/in{index}_label"] = label
        files[f"{folder}/in{index}_input"] = millivolts
        files[f"{folder}/curr{index}_input"] = milliamperes
        files[f"{folder}/in{index + 3}_input"] = 1600
    return {**files, f"{folder}/in7_label": "sum of shunt voltages", f"{folder}/in7_input": 4800}


# A board's kernel 5.15 (JetPack 6): rails and addresses as in the Jetson Linux Developer Guide.
AGX_ORIN = {
    **ina3221(1, ("VDD_GPU_SOC", 20000, 600), ("VDD_CPU_CV", 20000, 100), ("VIN_SYS_5V0", 5000, 900)),
    **ina3221(2, ("NC", 0, 0), ("VDDQ_VDD2_1V8AO", 5000, 60), ("NC", 0, 0)),
    "proc/device-tree/compatible": "nvidia,p3737-0000+p3701-0005\0nvidia,tegra234\0",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=3 NAME=MODE_50W >",
    "var/lib/nvpmodel/status": "pmode:0003",
    "sys/class/devfreq/17000000.gpu/cur_freq": 1300500000,
    "sys/class/devfreq/17000000.gpu/min_freq": 306000000,
    "sys/class/devfreq/17000000.gpu/max_freq": 1300500000,
    "sys/class/devfreq/15480000.nvdec/cur_freq": 115200000,
    "sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq": 729600,
    "sys/devices/system/cpu/cpufreq/policy4/scaling_cur_freq": 2201600,
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
    "sys/class/thermal/thermal_zone0/temp": 49468,
    "sys/class/thermal/thermal_zone1/type": "gpu-thermal",  # off: the driver answers with an error
    "sys/class/thermal/thermal_zone1/temp": "",
    "sys/class/thermal/thermal_zone8/type": "tj-thermal",
    "sys/class/thermal/thermal_zone8/temp": 50125,
    "sys/class/thermal/cooling_device0/type": "pwm-fan",
    "sys/class/thermal/cooling_device0/cur_state": 2,
    "sys/class/thermal/cooling_device1/type": "gpu-throttle-alert",
    "sys/class/thermal/cooling_device1/cur_state": 0,
    "sys/class/hwmon/hwmon3/name": "soctherm_oc",
    "sys/class/hwmon/hwmon3/oc3_event_cnt": 37,
}


class Scripted:
    """A source whose values a function of time gives."""

    name = "scripted"

    def __init__(self, clock: Any, values: Any) -> None:
        self._clock, self._values = clock, values

    def read(self) -> Reading:
        found: dict[Key, float] = self._values(self._clock())
        return found

    def close(self) -> None:
        pass


def recorded(values: Any, seconds: float, interval: float = 0.1, **refusals: Sequence[str]) -> Recorder:
    """A recorder that has sampled a function of time from 0 on, with no thread."""
    now = [0.0]
    sampler = Sampler([Scripted(lambda: now[0], values)], interval, clock=lambda: now[0])
    while now[0] <= seconds:
        sampler.sample()
        now[0] = round(now[0] + interval, 9)
    return Recorder(sampler, refusals, root=Path(os.devnull))


def orin_values(time: float) -> dict[Key, float]:
    """8 W at rest, 40 W of prefill from 1 s to 3 s, 25 W of decode to 6 s, and clocks that drop."""
    watts = 40.0 if 1 <= time < 3 else 25.0 if 3 <= time < 6 else 8.0
    return {
        ("power", "VDD_IN"): watts,
        ("clock", "GPU"): 1300.5e6 if time < 4 else 918e6,
        ("clock", "memory"): 3199e6,
        ("clock", "CPU"): 2201.6e6,
        ("temperature", "tj"): 45 + 3 * time,
        ("temperature", "cpu"): 44 + 2 * time,
        ("throttle", "gpu-throttle-alert"): float(4 <= time < 5),
        ("events", "over-current oc3"): float(int(time > 2) * 2),
    }


TELEMETRY = Telemetry(
    interval_s=0.1,
    reading_s=0.0021,
    cpu_share=0.012,
    sources=("INA3221", "devfreq", "cpufreq", "thermal zones", "throttling"),
    scope="VDD_IN, the module's input",
    idle_w=8.0,
    unreadable={"memory clock": "before JetPack 7 only root may read it"},
    jetson=True,
    power_mode="MAXN_SUPER",
    locked={"GPU": False},
)


def case_telemetry(prompt: int = 2048, decode: int = 60) -> CaseTelemetry:
    """Two repetitions as of `orin_values`, the first of them as long but a second later."""
    recorder = recorded(orin_values, 8)
    case = recorder.case(prompt, decode, [Run(1.5, 3.5, 6.0), Run(1.0, 3.0, 6.0)])
    return replace(case, idle_w=8.0)


def power_report() -> Report:
    """The sample report, its longer case with power."""
    report = sample_report()
    cases = [
        replace(report.cases[0], telemetry=case_telemetry(128)),
        replace(report.cases[1], telemetry=case_telemetry()),
    ]
    return replace(report, cases=tuple(cases), telemetry=TELEMETRY)
