"""When a request must have ended: what client and server say of it, and the error when it has not."""

from __future__ import annotations

from starlette.datastructures import Headers

from server.http.protocol.errors import TIMEOUT, ApiError, bad_request

DEADLINE = "deadline_exceeded"
HEADER = "x-request-timeout"


class DeadlineError(Exception):
    """The time that a request had is over."""


def seconds_of(headers: Headers) -> float | None:
    """The seconds that a header allows; None: it is not there.

    Raises:
        ApiError: it is not a number of seconds.
    """
    text = headers.get(HEADER)
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise bad_request(
            f"the header {HEADER} must be a number of seconds above 0, such as 30", param=HEADER
        )
    return seconds


def deadline_of(started: float, *allowed: float | None) -> float | None:
    """The moment, on the clock of `started`, when the least of what is allowed is over; None: nothing bounds it."""
    least = min((seconds for seconds in allowed if seconds is not None), default=None)
    return None if least is None else started + least


def too_late(seconds: float) -> ApiError:
    """The error of a request that had so many seconds."""
    return ApiError(
        408,  # not a 5xx: it is the client that allowed no more
        f"the answer did not end within the request's {seconds:g} s; ask for less, or allow more time",
        kind=TIMEOUT,
        code=DEADLINE,
    )
