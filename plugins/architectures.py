"""GPU architectures: the names people use, what the kernels support, and what the GPU at hand is."""

from __future__ import annotations

import difflib
import re
import shutil
import subprocess
from pathlib import Path

from mmm_export.errors import BuildError, OptionError

# Compute capability: oldest CUDA release whose nvcc has it (of 90: its matrix instructions, sm_90a). 80 is the first with bf16
# matrix instructions and asynchronous copies.
OLDEST_CUDA: dict[int, tuple[int, int]] = {
    80: (11, 0),
    86: (11, 1),
    87: (11, 4),
    88: (13, 0),
    89: (11, 8),
    90: (12, 0),
    100: (12, 8),
    103: (12, 9),
    110: (13, 0),
    120: (12, 8),
    121: (12, 9),
}
NAMES: dict[str, int] = {
    "ampere": 80,
    "a100": 80,
    "a30": 80,
    "rtx30": 86,
    "a10": 86,
    "a40": 86,
    "a6000": 86,
    "orin": 87,
    "ada": 89,
    "rtx40": 89,
    "l4": 89,
    "l40": 89,
    "hopper": 90,
    "h100": 90,
    "h200": 90,
    "gh200": 90,
    "blackwell": 100,
    "b200": 100,
    "gb200": 100,
    "b300": 103,
    "gb300": 103,
    "thor": 110,
    "rtx50": 120,
    "spark": 121,
}
_TEGRA = {
    "nvidia,tegra234": 87,
    "nvidia,tegra264": 110,
}  # Jetsons whose nvidia-smi does not know the compute capability
_COMPATIBLE = Path("/proc/device-tree/compatible")
_NVIDIA_SMI_TIMEOUT_S = 10  # it hangs on some broken drivers


def dotted(architecture: int) -> str:
    """Spell an architecture as NVIDIA's tables do: 87 is "8.7", 120 is "12.0"."""
    return f"{architecture // 10}.{architecture % 10}"


def parse_architectures(text: str) -> tuple[int, ...]:
    """Turn "87,90", "sm_87", "8.7", "orin,hopper", "native" or "none" into sorted compute capabilities without repeats.

    Raises:
        OptionError: a word that is no architecture, or one that the kernels do not support.
        BuildError: "native" where no GPU is found.
    """
    words = [word.strip().lower() for word in text.split(",") if word.strip()]
    if words == ["none"]:
        return ()
    if not words or "none" in words:
        raise OptionError(
            "--cuda-arch names no architecture" if not words else '--cuda-arch mixes "none" with architectures',
            found=repr(text),
            wanted='such as 87,90 or orin, or "native", or "none" alone',
        )
    found: set[int] = set()
    for word in words:
        found.update(native_architectures() if word == "native" else [_architecture(word)])
    return tuple(sorted(found))


def _architecture(word: str) -> int:
    if word in NAMES:
        return NAMES[word]
    match = re.fullmatch(r"(?:sm_?|compute_)?(\d{2,3}|\d{1,2}\.\d)", word)
    number = int(match[1].replace(".", "")) if match else 0
    if number in OLDEST_CUDA:
        return number
    hint = "it is called 110 since CUDA 13" if number == 101 else None
    if match and 0 < number < min(OLDEST_CUDA):
        hint = (
            f"the kernels need SM {dotted(min(OLDEST_CUDA))} or newer; the CPU reference builds with --cuda-arch none"
        )
    near = difflib.get_close_matches(word, NAMES, n=1)
    raise OptionError(
        f"--cuda-arch has no architecture {word!r}",
        wanted=f"one of {', '.join(map(str, OLDEST_CUDA))}, or {', '.join(NAMES)}, or native, or none",
        hint=hint or (f"did you mean {near[0]}?" if near else None),
    )


def native_architectures() -> tuple[int, ...]:
    """Ask the driver for the GPUs of this machine.

    Raises:
        BuildError: there is none, or one that the kernels do not support.
    """
    said = _nvidia_smi()
    found = {int(major + minor) for major, minor in re.findall(r"^\s*(\d+)\.(\d)\s*$", said, re.MULTILINE)}
    if not found:
        found = _tegra()
    if not found:
        raise BuildError(
            "this machine shows no GPU to compile for",
            found=said.strip().splitlines()[0][:200] if said.strip() else "no answer from nvidia-smi",
            wanted="an NVIDIA GPU and its driver",
            hint="name the GPU with --cuda-arch, such as --cuda-arch orin or 87,90, or compile for the CPU with --cuda-arch none",
        )
    unknown = sorted(found - set(OLDEST_CUDA))
    if unknown:
        raise BuildError(
            "the GPU of this machine is one that the kernels were not written for",
            found=", ".join(f"SM {dotted(number)}" for number in unknown),
            wanted="one of " + ", ".join(f"SM {dotted(number)}" for number in OLDEST_CUDA),
            hint="compile for another GPU with --cuda-arch, or for the CPU with --cuda-arch none",
        )
    return tuple(sorted(found))


def _nvidia_smi() -> str:
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_NVIDIA_SMI_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"nvidia-smi did not answer within {_NVIDIA_SMI_TIMEOUT_S} s"
    except OSError as error:
        return f"nvidia-smi does not run: {error.strerror}"
    return done.stdout or done.stderr


def _tegra() -> set[int]:
    try:
        names = _COMPATIBLE.read_text(encoding="utf-8").split("\0")
    except OSError:
        return set()
    return {_TEGRA[name] for name in names if name in _TEGRA}
