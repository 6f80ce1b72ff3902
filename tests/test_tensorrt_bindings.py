"""Our plugins, and every name of TensorRT that our code uses, on the real bindings of each supported version.

The same checks run here with TensorRT-RTX, and in child processes over stub libraries with the TensorRT of JetPack 6.2,
of JetPack 7.2 and of desktops (tests/tensorrt_stubs.py). What needs the libraries is in tests/test_plugin_operators.py.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest

from edge.tensorrt import load_flavour
from tests.plugin_checks import CHECKS
from tests.tensorrt_names import all_uses, check_names, own_names
from tests.tensorrt_stubs import WHEELS, check_version, run_checks, run_over_stubs

RTX = "rtx"
VERSIONS = (*WHEELS, RTX)
# Names that our code uses where they exist -> (versions without them, why that is right).
_OTHER_GPUS = (tuple(WHEELS), "only TensorRT-RTX compiles for GPUs that are not there")
_STREAMS = (("10.3",), "edge/tensorrt.py writes the engine as a whole")
ABSENT = {
    "ComputeCapability": _OTHER_GPUS,
    "IBuilderConfig.num_compute_capabilities": _OTHER_GPUS,
    "IBuilderConfig.set_compute_capability": _OTHER_GPUS,
    "Builder.build_serialized_network_to_stream": _STREAMS,
    "IStreamWriter": _STREAMS,
}


@functools.cache
def results(version: str) -> dict[str, Any]:
    checks = (check_version, check_names, *CHECKS)
    return run_checks(load_flavour("rtx").api, checks) if version == RTX else run_over_stubs(version, checks)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_plugins(check: str, version: str) -> None:
    result = results(version)[check]
    assert "failure" not in result, result["failure"]


@pytest.mark.parametrize("version", WHEELS)
def test_the_bindings_are_of_the_version_that_is_meant(version: str) -> None:
    assert results(version)["check_version"]["result"] == WHEELS[version].partition("==")[2]


@pytest.mark.parametrize("version", VERSIONS)
def test_names_exist(version: str) -> None:
    """A name is TensorRT's, and not of an object of ours that is called alike, if RTX has it or no class of ours."""
    assert {
        "Builder",
        "TensorFormat.LINEAR",
        "Builder.create_network",
        "IExecutionContext.execute_async_v3",
    } <= all_uses()
    missing = set(results(version)["check_names"]["result"])
    missing_in_rtx = set(results(RTX)["check_names"]["result"])
    ours = {name for name in missing_in_rtx if name.rpartition(".")[2] in own_names()}
    absent = [name for name, (versions, _) in ABSENT.items() if version in versions]
    known = {name: [other for other in missing if f"{other}.".startswith(f"{name}.")] for name in absent}
    assert missing - ours == set().union(*known.values())
    assert all(known.values()), "ABSENT lists names that are there, or that nothing uses"
