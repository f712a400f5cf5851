"""What a client did wrong, or could not be given, as OpenAI's API says it: {"error": {"message", "type", "param", "code"}}."""

from typing import Any

INVALID = "invalid_request_error"


class RequestError(Exception):
    """An answer that is an error. status: of HTTP; param: the field of the request that it is about."""

    def __init__(
        self, status: int, message: str, *, type: str = INVALID, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.type, self.param, self.code = status, message, type, param, code

    def as_dict(self) -> dict[str, Any]:
        """The body of the answer."""
        fields = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": fields}


def too_busy(waiting: int) -> RequestError:
    """The queue is full."""
    message = f"{waiting} requests are waiting already. Please try again later."
    return RequestError(429, message, type="requests", code="rate_limit_exceeded")


def timed_out(seconds: float) -> RequestError:
    """A request took longer than the server lets any take."""
    return RequestError(
        503, f"The request was not done within {seconds:g} seconds.", type="server_error", code="timeout"
    )


def stopping() -> RequestError:
    """The server ends."""
    return RequestError(503, "The server is shutting down.", type="server_error", code="shutting_down")


def too_long(tokens: int, context: int, param: str) -> RequestError:
    """A prompt that leaves no room for an answer."""
    message = (
        f"This model's maximum context length is {context} tokens. However, your {param} resulted in {tokens} tokens. "
        f"Please reduce the length of the {param}."
    )
    return RequestError(400, message, param=param, code="context_length_exceeded")


def broken(error: Exception) -> RequestError:
    """An error that is nobody's input: a bug."""
    return RequestError(500, f"The server had an error: {type(error).__name__}: {error}", type="server_error")
