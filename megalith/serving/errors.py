"""What a server answers where it cannot do what a request asks. Other MegalithErrors are the request's, status 400."""

from __future__ import annotations

from megalith.common.errors import MegalithError


class ServingError(MegalithError):
    """An answer with a status of its own.

    retry_after: seconds after which to try again, where that may help. param: the field that is wrong, as the client
    wrote it. code: OpenAI's word for what is wrong.
    """

    status = 500
    code: str | None = None

    def __init__(
        self, message: str, retry_after: int | None = None, *, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.retry_after, self.param, self.code = retry_after, param, code or self.code


class BadRequest(ServingError):
    """A field of the request cannot be as it is."""

    status = 400


class Unauthorized(ServingError):
    """The request brings no token, or a wrong one."""

    status, code = 401, "invalid_api_key"


class NotFound(ServingError):
    """The request names something that this server does not have."""

    status = 404


class Forbidden(ServingError):
    """The request comes from a page of another site, or is meant for another host."""

    status = 403


class TooSlow(ServingError):
    """The body took too long to arrive."""

    status = 408


class TooLarge(ServingError):
    """The body is larger than --max-body-bytes."""

    status = 413


class Busy(ServingError):
    """As many texts wait as may wait (--max-waiting)."""

    status, code = 429, "rate_limit_exceeded"


class Failed(ServingError):
    """The model could not write this text; others are not concerned."""

    status = 500


class Unavailable(ServingError):
    """The model is lost, or the server is ending."""

    status = 503


class TimedOut(ServingError):
    """The request took longer than --request-timeout."""

    status = 504
