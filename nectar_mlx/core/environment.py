"""Variables of the environment: those that huggingface_hub reads when it is imported, where a wrong one is a traceback,
and those by which MLX launches kernels."""

import os
from urllib.parse import urlsplit

from ..errors import NectarError

_SECONDS = ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT")


def check() -> None:
    """NectarError for a variable that huggingface_hub cannot read; an empty address is none, which it does not know."""
    endpoint = os.environ.get("HF_ENDPOINT", "")
    if not endpoint.strip():
        os.environ.pop("HF_ENDPOINT", None)
    try:
        parts = urlsplit(endpoint)
        _ = parts.hostname, parts.port
    except ValueError as error:
        raise NectarError(f"HF_ENDPOINT is {endpoint!r}, which is no address ({error}): change or unset it") from None
    for name in _SECONDS:
        value = os.environ.get(name, "")
        try:
            int(value or 0)
        except ValueError:
            raise NectarError(f"{name} is {value!r}, which is no whole number: change or unset it") from None


def launch_singly() -> None:
    """For commands that fit: MLX launches kernels one by one on NVIDIA, not as graphs, unless it is told otherwise. The
    arrays of a fit change their shapes at every step, and graphs would be built anew (docs/log/speed.md). It counts if
    nothing has been computed yet."""
    os.environ.setdefault("MLX_USE_CUDA_GRAPHS", "0")
