"""Asks one endpoint with prompts of exact lengths, and holds its count of tokens against what was sent."""

from __future__ import annotations

import asyncio

from lab.bench.endpoint import Endpoint
from lab.bench.errors import BenchError
from lab.bench.prompts import Words
from lab.bench.timing import Timing


class Asker:
    """Makes prompts for one endpoint.

    Attributes:
        endpoint: who is asked.
    """

    def __init__(self, endpoint: Endpoint, words: Words, *, as_text: bool, run: str) -> None:
        """Ask one server.

        Args:
            endpoint: who is asked
            words: what prompts are made of
            as_text: send text in place of token ids
            run: distinguishes this run's prompts from those of earlier runs, which a server may have cached
        """
        self.endpoint = endpoint
        self._words = words
        self._as_text = as_text
        self._run = run

    async def one(self, length: int, max_tokens: int, *, body: object, head: object) -> Timing:
        """One request.

        Args:
            length: tokens of the prompt
            max_tokens: of the answer
            body: equal ones give the same words after the head, on every endpoint
            head: unequal ones share no prefix, nor do those of two endpoints

        Raises:
            BenchError: the request failed, or the server counts another number of tokens.
        """
        return await self._send(self._prompt(length, body, head), max_tokens)

    async def with_tail(
        self, prefix: int, tail: int, *, body: object, head: object, tail_of: object
    ) -> Timing:
        """A request for one token, whose prompt's first `prefix` tokens only body and head decide."""
        return await self._send(self._prompt(prefix, body, head) + self._words.more(tail, tail_of), 1)

    async def many(
        self, count: int, length: int, max_tokens: int, *, body: object, head: object
    ) -> list[Timing]:
        """Several requests at once, no two alike."""
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
