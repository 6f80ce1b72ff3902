"""Power of a Jetson's supply rails, from its INA3221 and INA238 monitors in sysfs: no process, no root.

JetPack 5 and later: the kernel's hwmon drivers (Documentation/hwmon/ina3221.rst, ina238.rst), bus voltage in mV and
current in mA, or power in uW. Before: NVIDIA's own driver below iio, power in mW.
"""

from __future__ import annotations

from pathlib import Path

from edge.telemetry.reading import Key, Reading, SysFile, SysFiles, Unreadable, in_order, text_of

CHANNELS = (1, 2, 3)  # of an INA3221; its in4 to in7 are shunt voltages
INPUT = "VIN"  # what an INA238, which has no labels, measures on a Jetson Thor: the supply's input


class Rails:
    """Watts by rail, of voltage times current."""

    def __init__(self, name: str, channels: dict[str, tuple[Path, Path]]) -> None:
        """`channels`: files of mV and mA by rail; Unreadable if there are none, or none may be read."""
        self.name = name
        self._channels: dict[str, tuple[SysFile, SysFile]] = {}
        refused = ""
        for rail, (voltage, current) in channels.items():
            try:
                self._channels[rail] = (SysFile(voltage), SysFile(current))
            except OSError as error:
                refused = f"{error.filename}: {error.strerror}"
        if not self._channels:
            raise Unreadable(refused or "no INA3221 or INA238 in /sys/class/hwmon")

    def read(self) -> Reading:
        found: dict[Key, float] = {}
        for rail, (voltage, current) in self._channels.items():
            millivolts, milliamperes = voltage.number(), current.number()
            if millivolts is not None and milliamperes is not None:
                found["power", rail] = millivolts * milliamperes / 1e6
        return found

    def close(self) -> None:
        for voltage, current in self._channels.values():
            voltage.close()
            current.close()


def open_rails(root: Path) -> Rails:
    """The labelled channels of all INA3221; Unreadable if there is none."""
    channels = {}
    for folder in in_order(root.glob("sys/class/hwmon/hwmon*")):
        if not text_of(folder / "name").startswith("ina3221"):
            continue
        for number in CHANNELS:
            rail = text_of(folder / f"in{number}_label")
            if rail and rail != "NC":  # not connected
                channels[rail] = (folder / f"in{number}_input", folder / f"curr{number}_input")
    return Rails("INA3221", channels)


def open_input(root: Path) -> SysFiles:
    """The power that an INA238 computes itself; Unreadable if there is none."""
    files: dict[Key, tuple[Path, float]] = {}
    for folder in in_order(root.glob("sys/class/hwmon/hwmon*")):
        if text_of(folder / "name") == "ina238":
            files["power", text_of(folder / "in1_label") or INPUT] = (folder / "power1_input", 1e-6)
    return SysFiles("INA238", files, "no INA238 in /sys/class/hwmon")


def open_iio(root: Path) -> SysFiles:
    """The rails as JetPack 4 has them; Unreadable if there are none."""
    files: dict[Key, tuple[Path, float]] = {}
    for path in in_order(root.glob("sys/bus/i2c/drivers/ina3221x/*/iio:device*/rail_name_*")):
        rail, number = text_of(path), path.name.removeprefix("rail_name_")
        if rail and rail != "NC":
            files["power", rail] = (path.with_name(f"in_power{number}_input"), 1e-3)
    return SysFiles("INA3221 (iio)", files, "no ina3221x in /sys/bus/i2c/drivers")
