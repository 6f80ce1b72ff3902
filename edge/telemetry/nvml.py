"""NVIDIA's GPUs through libnvidia-ml, which every driver brings: energy, power, clocks, temperature, throttling.

Called with ctypes, so that no package is needed. Names and numbers: nvml.h, "NVML API Reference Guide".
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

from edge.telemetry.reading import Key, Reading, Unreadable
from edge.telemetry.recording import GPU_POWER

LIBRARY = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"
DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
SUCCESS = 0
SM_CLOCK, MEMORY_CLOCK = 1, 2  # nvmlClockType_t
GPU_TEMPERATURE = 0  # nvmlTemperatureSensors_t
# nvmlClocksEventReasons that hold clocks below what the load would get. Left out: idle (1), clocks that the user set
# (2), a group's common clock (16), the display (256).
REASONS = {
    0x04: "GPU: power limit (software)",
    0x08: "GPU: hardware slowdown",
    0x20: "GPU: temperature (software)",
    0x40: "GPU: temperature (hardware)",
    0x80: "GPU: power brake (hardware)",
}


class Nvml:
    """One GPU. Its energy counter, of Volta and later, is preferred: power is a mean over a second since Ampere."""

    def __init__(self, library: Any, device: ctypes.c_void_p) -> None:
        self._library, self._device = library, device
        name = ctypes.create_string_buffer(96)
        library.nvmlDeviceGetName(device, name, ctypes.c_uint(len(name)))
        self.name = f"NVML ({name.value.decode(errors='replace') or 'GPU'})"

    def read(self) -> Reading:
        found: dict[Key, float] = {}
        energy, power = ctypes.c_ulonglong(), ctypes.c_uint()
        if self._ask("nvmlDeviceGetTotalEnergyConsumption", ctypes.byref(energy)):
            found["energy", GPU_POWER] = energy.value / 1e3
        elif self._ask("nvmlDeviceGetPowerUsage", ctypes.byref(power)):
            found["power", GPU_POWER] = power.value / 1e3
        for unit, kind in (("GPU", SM_CLOCK), ("memory", MEMORY_CLOCK)):
            clock = ctypes.c_uint()
            if self._ask("nvmlDeviceGetClockInfo", ctypes.c_int(kind), ctypes.byref(clock)) and clock.value:
                found["clock", unit] = clock.value * 1e6
        degrees = ctypes.c_uint()
        if self._ask("nvmlDeviceGetTemperature", ctypes.c_int(GPU_TEMPERATURE), ctypes.byref(degrees)):
            found["temperature", "GPU"] = float(degrees.value)
        bits = ctypes.c_ulonglong()
        if self._ask("nvmlDeviceGetCurrentClocksThrottleReasons", ctypes.byref(bits)):
            found.update({("throttle", name): float(bool(bits.value & bit)) for bit, name in REASONS.items()})
        return found

    def _ask(self, function: str, *arguments: Any) -> bool:
        """Whether the driver has this function, and answered."""
        call = getattr(self._library, function, None)
        return call is not None and call(self._device, *arguments) == SUCCESS

    def close(self) -> None:
        self._library.nvmlShutdown()


def open_nvml(library: str = LIBRARY, driver: str = DRIVER) -> Nvml:
    """CUDA's first device, or the only one there is; Unreadable if NVML or every GPU is missing."""
    try:
        nvml = ctypes.CDLL(library)
    except OSError:
        raise Unreadable(f"no NVIDIA driver ({library})") from None
    nvml.nvmlErrorString.restype = ctypes.c_char_p
    code = nvml.nvmlInit_v2()
    if code != SUCCESS:
        raise Unreadable(f"NVML: {nvml.nvmlErrorString(code).decode(errors='replace')}")
    count, device = ctypes.c_uint(), ctypes.c_void_p()
    nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    # NVML counts by PCI bus, CUDA by speed or as CUDA_VISIBLE_DEVICES says.
    place = _bus_of_first(driver) if count.value > 1 else b""
    if place:
        code = nvml.nvmlDeviceGetHandleByPciBusId_v2(place, ctypes.byref(device))
    else:
        code = nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(0), ctypes.byref(device))
    if count.value == 0 or code != SUCCESS:
        nvml.nvmlShutdown()
        raise Unreadable("NVML: no GPU" if count.value == 0 else f"NVML: {nvml.nvmlErrorString(code).decode()}")
    return Nvml(nvml, device)


def _bus_of_first(driver: str) -> bytes:
    """The PCI address of CUDA's first device; b"" if CUDA does not say."""
    try:
        cuda = ctypes.CDLL(driver)
    except OSError:
        return b""
    device, place = ctypes.c_int(), ctypes.create_string_buffer(32)
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0):
        return b""
    return b"" if cuda.cuDeviceGetPCIBusId(place, len(place), device) else place.value
