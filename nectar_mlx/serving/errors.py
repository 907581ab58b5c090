"""What a client is told: {"error": {message, type, code, param}}, as OpenAI's API does."""

from ..answering import SamplingError
from ..core.types import JsonObject
from ..errors import NectarError
from .engine import Busy
from .shelf import UnknownModel, UnreadableFile


class ApiError(Exception):
    """An answer with an error. status: of HTTP. code: for a program. param: the field of the request."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    @property
    def body(self) -> JsonObject:
        kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {"error": {"message": self.message, "type": kind, "code": self.code, "param": self.param}}


def refused(param: str, reason: str) -> ApiError:
    """A field that is understood and not supported."""
    return ApiError(400, f"{param}: {reason}", code="unsupported_value", param=param)


def as_api_error(error: BaseException) -> ApiError:
    """What a client is told about an error; nothing of the server's inside for one that was not expected."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UnknownModel):
        return ApiError(404, str(error), code="model_not_found", param="model")
    if isinstance(error, UnreadableFile):  # its message names a path
        return ApiError(503, "this model's file cannot be read; the server's log says why", code="file_unreadable")
    if isinstance(error, SamplingError):
        return ApiError(400, str(error), code="invalid_value", param=error.name)
    if isinstance(error, NectarError):
        return ApiError(400, str(error), code="invalid_value")
    if isinstance(error, Busy):
        return ApiError(429, "too many open requests: try again in a moment", code="busy")
    return ApiError(500, "an error in the server; its log says more", code="internal_error")
