"""What a client is told when its request cannot be answered, in OpenAI's shape."""

from typing import Any

from duomoe.errors import Busy, InputError, PromptTooLong

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """A request cannot be answered; the message says what would help.

    Args:
        status: of HTTP.
        message: one line.
        param: the field that is wrong, as `messages[2].content`.
        code: what programs may tell errors apart by.
        retry_after: seconds after which another try may go well.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The error as clients read it."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class ClientGone(Exception):
    """The client has closed its connection; nobody reads an answer."""


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return the error for a field that cannot be used."""
    return ApiError(400, message, param, code)


def as_api_error(error: BaseException) -> ApiError:
    """Return what a client is told of any error: its own mistakes in full, of others only that they happened."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, PromptTooLong):
        return invalid(str(error), code="context_length_exceeded")
    if isinstance(error, Busy):
        return ApiError(503, str(error), code="busy", retry_after=5)
    if isinstance(error, InputError):
        return invalid(str(error))
    return ApiError(500, f"the request failed within the server ({type(error).__name__}); its log says why")
