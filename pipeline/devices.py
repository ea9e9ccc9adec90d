"""Makes sure that a process to which Ray gave a GPU computes on one; TensorFlow would take the CPU silently."""

import os
import socket

CHECK_SECONDS = 60.0
"""How long a check in the cluster waits for a free GPU. Where none gets free, the process itself checks later."""


class GpuError(RuntimeError):
    """A process was given a GPU on which TensorFlow cannot compute."""


def require_gpu(option: str) -> None:
    """Checks that TensorFlow sees the GPU of this process. It neither uses the GPU nor ties TensorFlow to settings.

    Args:
        option: The option that asked for a GPU, for the message.

    Raises:
        GpuError: if TensorFlow sees none; names the host, what TensorFlow was built with, what is there and the remedy.
    """
    import tensorflow as tf

    if tf.config.list_physical_devices("GPU"):
        return
    build = tf.sysconfig.get_build_info()
    cuda = f"for CUDA {build['cuda_version']}" if build.get("is_cuda_build") else "without CUDA"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    driver = os.path.exists("/proc/driver/nvidia/version")
    if not driver:
        remedy = "install NVIDIA's driver on that host, and give containers access to it"
    elif not build.get("is_cuda_build"):
        remedy = "install a TensorFlow that was built with CUDA there"
    else:
        remedy = "install the CUDA libraries there: pip install 'keras-perceiver-ray[gpu]'"
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


def _negated(option: str) -> str:
    """The command-line option that turns a flag off: `train.use_gpu` gives `train.no-use-gpu`."""
    section, _, name = option.rpartition(".")
    return f"{section}{'.' if section else ''}no-{name}".replace("_", "-")
