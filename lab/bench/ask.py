"""Asks one endpoint with prompts of exact lengths, and checks that the server counts as many tokens as were sent."""

from __future__ import annotations

import asyncio

from lab.bench.endpoint import Endpoint
from lab.bench.errors import BenchError
from lab.bench.prompts import Words
from lab.bench.timing import Timing


class Asker:
    """Sends prompts to one endpoint.

    Attributes:
        endpoint: the server to ask.
    """

    def __init__(self, endpoint: Endpoint, words: Words, *, as_text: bool, run: str) -> None:
        """Prepare to ask one server.

        Args:
            endpoint: the server to ask
            words: makes the prompts
            as_text: send text instead of token ids
            run: makes this run's prompts different from those of earlier runs, which a server may have cached
        """
        self.endpoint = endpoint
        self._words = words
        self._as_text = as_text
        self._run = run

    async def one(self, length: int, max_tokens: int, *, body: object, head: object) -> Timing:
        """Send one request.

        Args:
            length: tokens of the prompt
            max_tokens: tokens of the answer
            body: prompts with equal bodies have the same words after the head, on every endpoint
            head: prompts with different heads, or for different endpoints, share no prefix

        Raises:
            NotYetError: the server does not answer, or answers 503.
            BenchError: the request failed, or the server counts another number of tokens.
        """
        return await self._send(self._prompt(length, body, head), max_tokens)

    async def with_tail(
        self, prefix: int, tail: int, *, body: object, head: object, tail_of: object
    ) -> Timing:
        """Send a request for one token.

        `body` and `head` decide the prompt's first `prefix` tokens, and `tail_of` decides the other `tail` tokens.
        """
        return await self._send(self._prompt(prefix, body, head) + self._words.more(tail, tail_of), 1)

    async def many(
        self, count: int, length: int, max_tokens: int, *, body: object, head: object
    ) -> list[Timing]:
        """Send `count` different requests at once."""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self.one(length, max_tokens, body=(body, i), head=(head, i)))
                    for i in range(count)
                ]
        except* Exception as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    def _prompt(self, length: int, body: object, head: object) -> list[int]:
        return self._words.prompt(length, body=body, head=(self._run, self.endpoint.name, head))

    async def _send(self, ids: list[int], max_tokens: int) -> Timing:
        timing = await self.endpoint.complete(self._words.text(ids) if self._as_text else ids, max_tokens)
        if timing.prompt_tokens != len(ids):
            raise BenchError(
                f"{self.endpoint.name} counted {timing.prompt_tokens} tokens in a prompt of {len(ids)}: its tokenizer "
                "is another one; name its model as MODEL"
            )
        return timing
