"""What can be wrong with a machine, and what `edge doctor` must say of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edge.doctor.machine import Output
from tests.doctor_samples import (
    GIB,
    NO_BINDINGS,
    NO_DRIVER,
    NO_RTX,
    NO_TENSORRT,
    ORIN_GPU,
    RELEASE,
    RTX_GPU,
    Recorded,
    devfreq,
    meminfo,
    nano_jetpack_6,
    rtx_pc,
)


def set_file(path: str, text: str) -> Callable[[Recorded], None]:
    return lambda recorded: recorded.files.update({path: text})


def set_answer(name: str, answer: Any) -> Callable[[Recorded], None]:
    return lambda recorded: recorded.answers.update({name: answer})


def set_field(name: str, value: Any) -> Callable[[Recorded], None]:
    return lambda recorded: recorded.fields.update({name: value})


def closed_venv(recorded: Recorded) -> None:
    """The usual fault on a Jetson."""
    recorded.answers["tensorrt"] = NO_TENSORRT
    recorded.fields["venv"] = "/opt/edge/pyvenv.cfg"
    recorded.fields["files"] = {"/opt/edge/pyvenv.cfg": "home = /usr/bin\ninclude-system-site-packages = false\n"}


def other_python(recorded: Recorded) -> None:
    recorded.answers["tensorrt"] = NO_TENSORRT
    recorded.fields["python"] = "3.11.9"


def no_system_tensorrt(recorded: Recorded) -> None:
    recorded.answers["tensorrt"] = NO_TENSORRT
    del recorded.files["usr/lib/python3.10/dist-packages/tensorrt/__init__.py"]


def no_swap(recorded: Recorded) -> None:
    recorded.files["proc/swaps"] = "Filename Type Size Used Priority\n"
    recorded.files["proc/meminfo"] = meminfo(7990 << 20, cma=960 << 20)


def no_nvpmodel(recorded: Recorded) -> None:
    """As inside a container: the status file alone tells the mode."""
    recorded.answers["nvpmodel"] = None
    recorded.files["var/lib/nvpmodel/status"] = "pmode:0001 fmode:quiet\n"


def no_bindings_nor_driver(recorded: Recorded) -> None:
    recorded.answers["gpu"] = NO_BINDINGS
    recorded.answers["nvidia-smi"] = None
    del recorded.files["sys/module/nvidia/version"]


JETSON_FAULTS = {
    "a venv that hides JetPack's packages": (
        closed_venv,
        "TensorRT",
        "problem",
        r"not installed",
        r"^sed -i '/\^include-system-site-packages/ s/false/true/' /opt/edge/pyvenv.cfg ",
    ),
    "another Python than TensorRT's": (other_python, "TensorRT", "problem", "", r"^/usr/bin/python3.10 -m venv --sys"),
    "no TensorRT": (no_system_tensorrt, "TensorRT", "problem", "", "sudo apt install python3-libnvinfer$"),
    "TensorRT that does not load": (
        set_answer("tensorrt", {"error": "ImportError: libnvinfer.so.10", "code": "broken"}),
        "TensorRT",
        "problem",
        "libnvinfer",
        "--reinstall python3-libnvinfer",
    ),
    "JetPack 6.0": (
        set_file("etc/nv_tegra_release", RELEASE.format("36", "3.0")),
        "JetPack",
        "problem",
        r"JetPack 6.0 \(L4T R36.3.0\): too old",
        "apt dist-upgrade",
    ),
    "JetPack of the future": (
        set_file("etc/nv_tegra_release", RELEASE.format("40", "1.0")),
        "JetPack",
        "warning",
        "newer than",
        "pip install -U",
    ),
    "Xavier": (
        set_file("proc/device-tree/compatible", "nvidia,p2972-0000\0nvidia,tegra194\0"),
        "board",
        "note",
        "tegra194: kernels exist for Orin",
        "edge export",
    ),
    "an old driver": (
        set_answer("gpu", {**ORIN_GPU, "driver_version": [12, 2]}),
        "driver",
        "problem",
        "CUDA 12.2: the kernels need CUDA 12.6",
        "SDK Manager",
    ),
    "cuda-bindings for another CUDA": (
        set_answer("gpu", {**ORIN_GPU, "bindings": "13.5.0"}),
        "cuda-bindings",
        "problem",
        "for CUDA 13, the driver for CUDA 12",
        r"^pip install 'cuda-bindings>=12.9,<13'$",
    ),
    "no cuda-bindings": (
        set_answer("gpu", NO_BINDINGS),
        "cuda-bindings",
        "problem",
        "missing",
        r"^pip install 'cuda-bindings>=12.9,<13'$",
    ),
    "a driver that crashes": (
        set_answer("gpu", Output(-11, "")),
        "GPU",
        "problem",
        "crashed .SIGSEGV",
        "reboot",
    ),
    "a driver that hangs": (set_answer("gpu", Output(None, "")), "GPU", "problem", "no answer within", "reboot"),
    "not in group video": (
        lambda r: (set_field("devices", {"/dev/nvmap": False})(r), set_answer("groups", "me")(r))[0],
        "device files",
        "problem",
        "/dev/nvmap may not be opened; neither",
        r"usermod -aG video,render \$USER",
    ),
    "a small CMA": (
        set_file("proc/meminfo", meminfo(7990 << 20, cma=256 << 20, swap=8 * GIB)),
        "CMA",
        "warning",
        "256 MiB",
        "cma=950M",
    ),
    "no swap": (no_swap, "swap", "warning", "none", "swapon /swapfile"),
    "zram alone": (
        set_file("proc/swaps", "Filename Type Size Used Priority\n/dev/zram0 partition 669348 0 5\n"),
        "swap",
        "note",
        "zram",
        "swapon",
    ),
    "a slow power mode": (
        set_answer("nvpmodel", "NV Power Mode: 15W\n0\n"),
        "power mode",
        "warning",
        r"15W \(mode 0\); MAXN_SUPER is faster",
        r"^sudo nvpmodel -m 2$",
    ),
    "a power mode from the status file": (no_nvpmodel, "power mode", "warning", "25W .mode 1.", "nvpmodel -m 2"),
    "clocks that move": (
        lambda r: r.files.update(devfreq("17000000.gpu", 306000000, 306000000, 918000000)),
        "clocks",
        "warning",
        "GPU 306 of 918 MHz: GPU not locked",
        "^sudo jetson_clocks",
    ),
    "heat": (set_file("sys/class/thermal/thermal_zone8/temp", "96500"), "temperature", "warning", "96 °C .tj.", "fan"),
    "a weak supply": (
        set_file("sys/class/hwmon/hwmon3/oc1_event_cnt", "3"),
        "power supply",
        "warning",
        "3 times by low voltage",
        "power supply",
    ),
    "little memory": (set_field("available_memory", GIB), "memory", "warning", "1.0 GiB of 7.8", "isolate multi-user"),
    "a full disk": (set_field("cache_free", 100 << 20), "disk", "warning", "0.1 GiB free", "EDGE_CACHE"),
    "no compiler": (
        lambda r: (set_field("operators", ())(r), set_answer("g++", None)(r))[0],
        "CPU operators",
        "note",
        "no g",
        "apt install g",
    ),
}
PC_FAULTS = {
    "no driver": (
        lambda r: (set_answer("gpu", NO_DRIVER)(r), set_answer("nvidia-smi", None)(r))[0],
        "GPU",
        "problem",
        "cuInit is not to be had$",
        "driver 580",
    ),
    "neither driver nor bindings": (no_bindings_nor_driver, "driver", "problem", "none is loaded", "driver 580"),
    "a driver without a GPU": (
        set_answer("gpu", {"error": "cuInit failed", "code": "CUDA_ERROR_NO_DEVICE", "bindings": "13.5.0"}),
        "GPU",
        "problem",
        "cuInit failed",
        "CUDA_VISIBLE_DEVICES",
    ),
    "a driver that was updated": (
        set_answer("gpu", {"error": "x", "code": "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "bindings": "13.5.0"}),
        "GPU",
        "problem",
        "x",
        "^sudo reboot",
    ),
    "an old driver": (
        set_answer("gpu", {**RTX_GPU, "driver_version": [12, 8], "bindings": "12.9.10"}),
        "driver",
        "problem",
        "CUDA 12.8, driver 580.65.06: the kernels need CUDA 13.0",
        "driver 580",
    ),
    "no cuda-bindings": (
        set_answer("gpu", NO_BINDINGS),
        "cuda-bindings",
        "problem",
        "missing",
        r"^pip install 'cuda-bindings>=13'$",
    ),
    "no TensorRT": (
        set_answer("tensorrt_rtx", NO_RTX),
        "TensorRT",
        "problem",
        "",
        r"^pip install 'minicpm-edge\[rtx\]'$",
    ),
    "a GPU without kernels": (
        set_answer("gpu", {**RTX_GPU, "architecture": "sm_61"}),
        "GPU",
        "note",
        "sm_61, 46 SMs: there are no kernels for it",
        "^$",
    ),
    "a full GPU": (
        set_answer("gpu", {**RTX_GPU, "free_memory": GIB}),
        "GPU memory",
        "warning",
        "1.0 GiB of",
        "nvidia-smi",
    ),
    "heat": (set_answer("nvidia-smi", "580.65.06, 91\n"), "temperature", "warning", "91 °C .GPU.", "air"),
}
FAULTS = {
    **{f"Jetson: {name}": (nano_jetpack_6, *case) for name, case in JETSON_FAULTS.items()},
    **{f"RTX PC: {name}": (rtx_pc, *case) for name, case in PC_FAULTS.items()},
}
