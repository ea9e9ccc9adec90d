"""Everything that depends on the device of a process, in one place: what TensorFlow is told, and what it then used.

A process to which Ray gave a GPU computes on one or ends with an error; TensorFlow would take the CPU silently.
"""

import contextlib
import ctypes
import importlib.util
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from perceiver.processor import cpu_name as cpu_name
from perceiver.processor import has_bfloat16_kernels

Precision = Literal["float32", "mixed_bfloat16", "mixed_float16"]
CHECK_SECONDS = 60.0
"""How long a check in the cluster waits for a free GPU. Where none gets free, the process itself checks later."""
XLA_TRITON = "--xla_gpu_enable_triton_gemm"
"""XLA's flag for matrix products by Triton kernels beside those of cuBLAS."""


class DeviceError(RuntimeError):
    """A process cannot compute on its device; the message has the remedy."""


class GpuError(DeviceError):
    """A process was given a GPU on which TensorFlow cannot compute."""


class OutOfMemoryError(DeviceError):
    """The memory of a device does not suffice."""


def set_up_tensorflow(threads: int, use_gpu: bool, *, divides_operations: bool = True) -> None:
    """Tells TensorFlow what this process may use. To be called before the first operation.

    Args:
        threads: Number of threads of its two pools, which would otherwise take all cores of the host.
        use_gpu: Whether to compute on the first GPU that Ray has left visible; if not, on none. Its memory is taken as
            it is needed, since the driver, other libraries and perhaps other processes need some too.
        divides_operations: Whether threads divide an operation among them, or each computes whole operations.
    """
    import tensorflow as tf

    if use_gpu:
        load_cusolver()
        leave_triton_out()
    tf.config.threading.set_intra_op_parallelism_threads(threads if divides_operations else 1)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    if gpus := tf.config.list_physical_devices("GPU"):
        used = gpus[: int(use_gpu)]
        tf.config.set_visible_devices(used, "GPU")
        for device in used:
            tf.config.experimental.set_memory_growth(device, True)


def load_cusolver() -> None:
    """Loads cuSOLVER from NVIDIA's package, if it is installed. To be called before TensorFlow looks for GPUs.

    TensorFlow 2.21 looks for NVIDIA's packages in the RUNPATH of libtensorflow_framework.so.2, which has the folders of
    all that it needs but cuSOLVER's, and it uses no GPU if one is missing. A library that is loaded is found by its
    name.
    """
    package = importlib.util.find_spec("nvidia")
    for folder in (package and package.submodule_search_locations) or ():
        for library in Path(folder).glob("cusolver/lib/libcusolver.so.*"):
            with contextlib.suppress(OSError):  # TensorFlow then says what is missing
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def leave_triton_out() -> None:
    """Lets XLA multiply matrices by cuBLAS alone, unless XLA_FLAGS says otherwise. To be called before XLA compiles.

    With Triton's kernels in the choice, a compiled step of `cifar100_gpu` had a loss that was not finite on an H100 and
    took twice as long to compile; without them it has the gradients of the plain operations (docs/gpu.md).
    """
    flags = os.environ.get("XLA_FLAGS", "")
    is_file = bool(flags) and not flags.lstrip().startswith("--")  # XLA then reads the flags there
    if XLA_TRITON not in flags and not is_file:
        os.environ["XLA_FLAGS"] = f"{flags} {XLA_TRITON}=false".strip()


def communication_options(use_gpu: bool) -> Any:
    """How the workers of a `MultiWorkerMirroredStrategy` sum: with NCCL between GPUs, else in a ring over gRPC."""
    import tensorflow as tf

    implementations = tf.distribute.experimental.CommunicationImplementation
    implementation = implementations.NCCL if use_gpu else implementations.AUTO
    return tf.distribute.experimental.CommunicationOptions(implementation=implementation)


def best_precision(capability: tuple[int, int]) -> Precision:
    """The Keras dtype policy for a GPU of this CUDA compute capability.

    GPUs multiply bfloat16 in their matrix units from 8.0 (Ampere) on, and float16 from 7.0 (Volta) on. Older ones have
    no such units.
    """
    if capability >= (8, 0):
        return "mixed_bfloat16"
    return "mixed_float16" if capability >= (7, 0) else "float32"


def precision_advice(precision: str, use_gpu: bool, is_perceiver: bool) -> str:
    """A line if the device of this process is slow at the dtype of `train.precision`; else an empty string.

    Args:
        precision: A Keras dtype policy.
        use_gpu: Whether the process computes on its GPU, which `set_up_tensorflow` or `require_gpu` has found.
        is_perceiver: Whether the model is a Perceiver, which avoids what is slow on processors in 16 bits
            (`perceiver.implementations`).
    """
    if not use_gpu:
        if precision == "float32" or is_perceiver or has_bfloat16_kernels():
            return ""
        return (
            f"train.precision = {precision} is slow on {cpu_name()}, which has no AVX-512, above all in the "
            "gradients of convolutions: --train.precision float32 suits it"
        )
    for name, capability in _gpus():
        best = best_precision(capability)
        if precision != best and not (
            precision == "float32" or (precision == "mixed_float16" and capability >= (7, 0))
        ):
            return (
                f"train.precision = {precision} is slow on {name}, whose compute capability is {capability[0]}."
                f"{capability[1]}: --train.precision {best} suits it"
            )
    return ""


def used_device() -> str:
    """Name of the device on which TensorFlow computes in this process: that of the GPU, or else of the processor."""
    import tensorflow as tf

    if tf.config.list_logical_devices("GPU"):
        return _gpus()[0][0]
    return f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores"


def used_gpus() -> int:
    """Number of GPUs on which TensorFlow computes in this process."""
    import tensorflow as tf

    return len(tf.config.list_logical_devices("GPU"))


def _gpus() -> list[tuple[str, tuple[int, int]]]:
    """Name and compute capability of each GPU that TensorFlow may use in this process."""
    import tensorflow as tf

    details = [tf.config.experimental.get_device_details(each) for each in tf.config.get_visible_devices("GPU")]
    return [(each.get("device_name", "GPU"), each.get("compute_capability", (0, 0))) for each in details]


@contextlib.contextmanager
def memory_errors(remedy: str) -> Iterator[None]:
    """Gives an error of TensorFlow that says that memory is exhausted one message with a remedy.

    Raises:
        OutOfMemoryError: instead of such an error; names the device, the host and what could not be allocated.
    """
    import tensorflow as tf

    try:
        yield
    except tf.errors.OpError as error:
        # A status of this kind also says that a message of the network is too long; XLA has another status.
        said = [line for line in error.message.splitlines() if "OOM when" in line or "out of memory" in line.lower()]
        if not said:
            raise
        raise OutOfMemoryError(
            f"the memory of {used_device()} on {socket.gethostname()} does not suffice: {said[0].strip()}: {remedy}"
        ) from error


def driver_is_loaded() -> bool:
    """Whether NVIDIA's driver is there. Some sandboxes of containers show its devices and not its folder in /proc."""
    return any(map(os.path.exists, ("/proc/driver/nvidia/version", "/dev/nvidiactl")))


def require_gpu(option: str) -> None:
    """Checks that TensorFlow sees the GPU of this process. It neither uses the GPU nor ties TensorFlow to settings.

    Args:
        option: The option that asked for a GPU, for the message.

    Raises:
        GpuError: if TensorFlow sees none; names the host, what TensorFlow was built with, what is there and the remedy.
    """
    import tensorflow as tf

    load_cusolver()
    if tf.config.list_physical_devices("GPU"):
        return
    build = tf.sysconfig.get_build_info()
    cuda = f"for CUDA {build['cuda_version']}" if build.get("is_cuda_build") else "without CUDA"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    driver = driver_is_loaded()
    if not driver:
        remedy = "install NVIDIA's driver on that host, and give containers access to it"
    elif not build.get("is_cuda_build"):
        remedy = "install requirements-gpu.txt there, whose TensorFlow is built with CUDA"
    else:
        remedy = "install the CUDA libraries there: requirements-gpu.txt has them"
    raise GpuError(
        f"{option}: Ray gave a process on {socket.gethostname()} the GPU {visible!r} (CUDA_VISIBLE_DEVICES), but "
        f"TensorFlow {tf.__version__}, built {cuda}, sees none there; NVIDIA's driver is "
        f"{'loaded' if driver else 'not loaded'}: {remedy}; or compute on CPUs with --{_negated(option)}"
    )


def multiply_on_gpu(option: str) -> None:
    """Multiplies two matrices on the first GPU and checks the product. It initialises TensorFlow.

    Raises:
        GpuError: if the GPU does not multiply; contains what TensorFlow says.
    """
    import tensorflow as tf

    try:
        with tf.device("/GPU:0"):
            product = tf.linalg.matmul(tf.fill((8, 64), 2.0), tf.fill((64, 8), 0.5))
        right = "GPU" in product.device and bool(tf.reduce_all(product == 64.0).numpy())
        found = f"{product.device} gave {float(product[0, 0])}, where 64 is right"
    except tf.errors.OpError as error:
        right, found = False, error.message.split("\n")[0]
    if not right:
        raise GpuError(
            f"{option}: the GPU of a process on {socket.gethostname()} does not multiply matrices: {found}; look at "
            f"nvidia-smi there, or compute on CPUs with --{_negated(option)}"
        )


def require_gpu_in_cluster(option: str) -> None:
    """`require_gpu` in a process of the cluster that Ray gives a GPU, before anything expensive is started.

    Raises:
        GpuError: as `require_gpu`.
    """
    import ray

    check = ray.remote(num_cpus=0, num_gpus=1, max_retries=0)(require_gpu).remote(option)
    ready, _ = ray.wait([check], timeout=CHECK_SECONDS)
    if not ready:
        ray.cancel(check)
        return
    try:
        ray.get(ready)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, GpuError):
            raise error.cause from None
        raise


def mention_unused_gpus(option: str, say: Callable[[str], None]) -> None:
    """Says so if the cluster has GPUs, which a command that computes on CPUs leaves alone."""
    import ray

    if gpus := ray.cluster_resources().get("GPU"):
        has = "1 GPU" if gpus == 1 else f"{gpus:g} GPUs"
        say(f"the cluster has {has}, and this run computes on CPUs: --{option.replace('_', '-')} uses them")


def _negated(option: str) -> str:
    """The command-line option that turns a flag off: `train.use_gpu` gives `train.no-use-gpu`."""
    section, _, name = option.rpartition(".")
    return f"{section}{'.' if section else ''}no-{name}".replace("_", "-")
