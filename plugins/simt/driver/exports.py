"""C++ made from the CUDA headers: the whole API's symbols, whether implemented or not, and the tables of its names."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

from edge.errors import EdgeError

# Declared in cudaProfiler.h, which is in no wheel that is needed otherwise.
_PROFILER = ("cuProfilerInitialize", "cuProfilerStart", "cuProfilerStop")
# What a name of cuda.h stands for: '#define cuMemcpyHtoD __CUDA_API_PTDS(cuMemcpyHtoD_v2)'.
_RENAMED = re.compile(
    r"^\s*#define\s+(cu[A-Z]\w*)\s+(?:__CUDA_API_PT[DS][SZ]\()?(cu[A-Z]\w*(?<!_ptsz))\)?\s*$", re.MULTILINE
)


def exports_source(headers: Path, sources: Iterable[str]) -> str:
    """What belongs to the `sources` of the driver: the tables of control.cpp, and the functions they do not define."""
    text = _preprocessed(headers)
    current = dict(_RENAMED.findall((headers / "cuda.h").read_text()))
    parameters = dict.fromkeys(_PROFILER, "") | dict(re.findall(r"\bCUresult\s+(cu[A-Z]\w*)\s*\(([^;]*)\);", text))
    defined = re.findall(r"^CUresult (cu\w+)\(", "".join(sources), re.MULTILINE)
    errors = re.findall(r"\b(CUDA_(?:SUCCESS|ERROR_\w+))\s*=\s*\d+", text)
    return "\n".join(
        [
            "namespace driver {",
            "const Symbol SYMBOLS[] = {",
            *(
                f'{{"{name}", {version}, "{symbol}"}},'
                for name, version, symbol in _symbols(headers, parameters, current)
            ),
            "};\nconst size_t SYMBOL_COUNT = std::size(SYMBOLS);",
            "const ErrorName ERROR_NAMES[] = {",
            *(f'{{{name}, "{name}"}},' for name in errors),
            "};\nconst size_t ERROR_COUNT = std::size(ERROR_NAMES);\n}",
            *_other_functions(parameters, {current.get(name, name) for name in defined}),
            "",
        ]
    )


def _other_functions(parameters: Mapping[str, str], defined: set[str]) -> list[str]:
    """An earlier form of a function that takes the same is another name for it; what is left is not supported."""
    lines = []
    for i, name in enumerate(sorted(parameters.keys() - defined)):
        forms = [form for form in sorted(defined) if re.fullmatch(rf"{name}_v\d+", form)]
        same = next((form for form in forms if parameters[form] == parameters[name]), None)
        if same:
            lines.append(f'asm(".globl {name}\\n.set {name}, {same}");')
        else:
            lines.append(f'extern "C" CUresult stub_{i}() asm("{name}");')
            lines.append(f"CUresult stub_{i}() {{ return CUDA_ERROR_NOT_SUPPORTED; }}")
    return lines


def _preprocessed(headers: Path) -> str:
    """cuda.h with the declarations of all forms of its functions."""
    command = ["g++", "-E", "-P", "-D__CUDA_API_VERSION_INTERNAL", "-x", "c", str(headers / "cuda.h")]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise EdgeError(
            f"g++ cannot read {headers / 'cuda.h'} ({error}); install g++ and nvidia-cuda-runtime again"
        ) from None


def _symbols(headers: Path, declared: Mapping[str, str], current: Mapping[str, str]) -> list[tuple[str, int, str]]:
    """(name, CUDA version, exported symbol) of each form of each function, by version.

    A name's forms are <name>, <name>_v2, ... in the order of the versions that cudaTypedefs.h gives; cuda.h says what
    `current` headers make of the name.
    """
    versions: dict[str, set[int]] = {}
    typedefs = (headers / "cudaTypedefs.h").read_text() + (headers / "cudaProfilerTypedefs.h").read_text()
    for name, version in re.findall(r"\bPFN_(cu[A-Z]\w*?)_v(\d+)\)", typedefs):
        versions.setdefault(name, set()).add(int(version))
    found = []
    for name, known in versions.items():
        forms = [name, *(f"{name}_v{i}" for i in range(2, len(known) + 1))]
        found += [(name, version, form) for version, form in zip(sorted(known), forms, strict=True) if form in declared]
        if current.get(name, name) not in forms:  # cuGraphInstantiate, which CUDA 12 gave to another function
            found.append((name, 12000, current[name]))
    return sorted(found, key=lambda entry: entry[1])
