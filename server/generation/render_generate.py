"""Turns deltas into the object of /inference/v1/generate, which has token ids only. Knows no engine."""

from __future__ import annotations

from collections.abc import Sequence

from server.generation.choice import TextDelta
from server.generation.streamed import Head, output_ids
from server.http.protocol.errors import ApiError
from server.http.protocol.generate import GenerateChoice, Generated
from server.http.protocol.usage import Usage


class GenerateRenderer:
    """Renders /inference/v1/generate, which has no stream."""

    def __init__(self, head: Head) -> None:
        self._head = head

    def opening(self) -> bytes:
        """Nothing."""
        return b""

    def events(self, delta: TextDelta) -> bytes:
        """Nothing."""
        return b""

    def ending(self, usage: Usage) -> bytes:
        """Nothing."""
        return b""

    def failure(self, error: ApiError) -> bytes:
        """Nothing."""
        return b""

    def whole(self, choices: Sequence[Sequence[TextDelta]], usage: Usage) -> Generated:
        """The response."""
        made = Generated(
            request_id=self._head.id,
            choices=[
                GenerateChoice(
                    index=index,
                    token_ids=[token_id for delta in deltas for token_id in output_ids(delta)],
                    finish_reason="length" if deltas[-1].finish_reason == "length" else "stop",
                )
                for index, deltas in enumerate(choices)
            ],
            usage=usage,
        )
        if self._head.notices:
            made = made.model_copy(update={"warnings": list(self._head.notices)})
        return made
