"""The processor of this host, as its operating system describes it. Imports no Keras."""

import contextlib
import platform
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")


def is_x86_64() -> bool:
    """Whether its architecture is x86-64."""
    return platform.machine() in ("x86_64", "AMD64")


def cpu_name() -> str:
    """Its name, or else that of its architecture."""
    return _field("model name") or platform.machine()


def has_bfloat16_kernels() -> bool:
    """Whether TensorFlow uses oneDNN's kernels for bfloat16 on it; True where that is not known.

    On x86-64 they need AVX-512, or AVX-NE-CONVERT, which processors have that came after it without AVX-512
    (`IsDataTypeSupportedByOneDNNOnThisCPU` in TensorFlow's util.cc). Other architectures have other ones.
    """
    flags = _field("flags") if is_x86_64() else None
    return flags is None or not {"avx512bw", "avx_ne_convert"}.isdisjoint(flags.split())


def _field(label: str) -> str | None:
    """A field of the first processor; None where the kernel does not say it."""
    with contextlib.suppress(OSError):
        for line in CPU_INFO.read_text().splitlines():
            if line.startswith(label):
                return line.partition(":")[2].strip()
    return None
