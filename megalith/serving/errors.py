"""What a server answers where it cannot do what a request asks. Other MegalithErrors are the request's, status 400."""

from __future__ import annotations

from megalith.common.errors import MegalithError


class ServingError(MegalithError):
    """An answer with a status of its own. retry_after: seconds after which to try again, where that may help."""

    status = 500

    def __init__(self, message: str, retry_after: int | None = None):
        super().__init__(message)
        self.retry_after = retry_after


class Unauthorized(ServingError):
    """The request brings no token, or a wrong one."""

    status = 401


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

    status = 429


class Failed(ServingError):
    """The model could not write this text; others are not concerned."""

    status = 500


class Unavailable(ServingError):
    """The model is lost, or the server is ending."""

    status = 503


class TimedOut(ServingError):
    """The request took longer than --request-timeout."""

    status = 504
