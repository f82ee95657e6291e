"""A request body as its endpoint understood it: what to generate, and how the answer reaches the client."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pydantic import BaseModel

from server.generation.intake import Admitted
from server.generation.render import Renderer
from server.http.protocol.errors import ApiError


@dataclass(frozen=True, slots=True)
class Later:
    """How a response is made in the background.

    Attributes:
        response_id: its id.
        queued: what the client gets at once.
        failed: is called with what went wrong, if anything does.
    """

    response_id: str
    queued: BaseModel
    failed: Callable[[ApiError], None]


@dataclass(frozen=True, slots=True)
class Order:
    """A request body as its endpoint understood it: the work, and how to send the answer.

    Attributes:
        work: what to generate.
        renderer: makes the answer.
        stream: whether the answer is streamed.
        later: the answer is made in the background; None: the client waits for it.
    """

    work: Admitted
    renderer: Renderer
    stream: bool
    later: Later | None = None
