"""Turns request bodies into jobs for this model, or says why a request cannot run.

This module refuses everything that the engine cannot handle: token ids outside the vocabulary, prompts longer
than the context, too many choices. The shape of a body is checked before, in `server.http.protocol`.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from engine.client import EngineStatus
from engine.protocol import SMALLEST_TEMPERATURE, Grammar, ModelInfo, SamplingParams, Submit
from server.chat import ChatFormat
from server.chat.answer import Answer
from server.chat.parsing import THINK, THOUGHT
from server.config import ServerConfig
from server.generation.choice import Job
from server.generation.conversation import Conversation, read_conversation, refuse_lost_variables
from server.generation.grammars import GrammarChecks
from server.generation.infill import infill_of
from server.generation.logprobs import check_counts, logprob_start, named_tokens, whole_count
from server.generation.prompts import Prompt, Prompts, check_ids, loaded_model, prompt_end
from server.generation.room import check_least, context_of, cut, room_of
from server.generation.sparsity import GrantedSparsity, granted
from server.generation.structure import Enforced, Structure, WantedCalls, wanted_of
from server.http.protocol.chat import ChatCompletionBody
from server.http.protocol.completions import CompletionBody
from server.http.protocol.errors import bad_request
from server.http.protocol.notices import Notice
from server.http.protocol.sampling import GenerationBody
from server.text.tokenizer import Tokenizer

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request that can run.

    Attributes:
        jobs: one for each choice, `n` for every prompt, in the order of their indices.
        echoes: for each choice, the text that its output begins with.
        sparsity: how sparse attention is.
        notices: what of the request has no effect.
        timeout: how long it may take, in seconds from its arrival; None: it does not say.
    """

    jobs: tuple[Job, ...]
    echoes: tuple[str, ...]
    sparsity: GrantedSparsity
    notices: tuple[Notice, ...] = ()
    timeout: float | None = None


class Intake:
    """Reads request bodies, given one server's settings, tokenizer and chat format.

    Attributes:
        prompts: makes the prompts.
    """

    def __init__(
        self, config: ServerConfig, text: Tokenizer, chat: ChatFormat, checks: GrammarChecks
    ) -> None:
        self._config = config
        self._text = text
        self._chat = chat
        self._infill = infill_of(text)
        self._structure = Structure(checks, text.control_tokens, chat)
        self.prompts = Prompts(config.model_names, text, chat)

    def use(self, config: ServerConfig) -> None:
        """Read requests by other settings from now on."""
        self._config = config

    async def chat(self, body: ChatCompletionBody, status: EngineStatus, request_id: str) -> Admitted:
        """Turn a conversation into jobs.

        Raises:
            ApiError: the conversation cannot be run; the message says what to change.
        """
        model = self._model(body, status)
        if body.top_logprobs is not None and not body.logprobs:
            raise bad_request("top_logprobs needs logprobs to be true", param="top_logprobs")
        limits = (body.max_completion_tokens, body.max_tokens)
        if None not in limits and limits[0] != limits[1]:
            raise bad_request(
                "max_tokens and max_completion_tokens are two names of one limit; send one of them",
                param="max_tokens",
            )
        said = read_conversation(body, self._chat)
        if self._config.unknown_fields == "refuse":
            refuse_lost_variables(said)
        open_end, opens = prompt_end(said.messages, body.add_generation_prompt, body.continue_final_message)
        if said.must_call and not opens:
            raise bad_request(
                "tool_choice opens a call at the start of an answer, so the prompt must end with the opening of one",
                param="tool_choice",
            )
        written = await self.prompts.written(
            said, add_generation_prompt=opens, open_end=open_end, context=context_of(body, model)
        )
        opening: tuple[int, ...] = ()
        if said.must_call:
            opening = tuple(
                self._text.encode(self._chat.opening(said.named), add_bos=False, parse_special=True)
            )
        whole = Prompt(tuple(written), "")
        token_ids = cut(whole, body, model, self._text, limits[0] or limits[1]).token_ids
        thinking = self._opens_reasoning(token_ids)
        opened = () if thinking else opening
        calls = None
        if said.forms:
            calls = WantedCalls(said.forms, must=said.must_call, named=said.named, single=said.single)
        enforced = await self._enforced(
            body, model, calls, thinking=thinking, may_think=said.thinking is None and opens and not opening
        )
        work = self._work(
            body,
            model,
            request_id,
            prompts=[Prompt((*token_ids, *opened), "")],
            max_tokens=limits[0] or limits[1],
            logprobs=(body.top_logprobs or 0) if body.logprobs or body.logprob_token_ids else None,
            answer=self._answer(body, said, opening, thinking=thinking),
            enforced=enforced,
        )
        echo = said.messages[-1]["content"] if body.echo else ""
        return replace(work, notices=said.notices, echoes=tuple(echo for _ in work.jobs))

    async def _enforced(
        self,
        body: GenerationBody,
        model: ModelInfo,
        calls: WantedCalls | None = None,
        *,
        thinking: bool = False,
        may_think: bool = False,
    ) -> Enforced | None:
        """The grammars of an answer; None: it may say anything."""
        wanted = wanted_of(body)
        strict = calls is not None and calls.strict
        if (body.ignore_eos or body.min_tokens) and (wanted is not None or strict):
            param = "a strict tool" if wanted is None else wanted.param
            name = "ignore_eos" if body.ignore_eos else "min_tokens"
            raise bad_request(
                f"{name} goes on after the end of an answer, and {param} says where that is; send one of them",
                param=name,
            )
        if body.ignore_eos:
            return None
        return await self._structure.grammar(
            wanted, calls, model.vocab_size, thinking=thinking, may_think=may_think
        )

    def _opens_reasoning(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt ends with <think>, or with <think> and a line break."""
        last = next(
            (token_id for token_id in reversed(prompt[-3:]) if token_id in self._text.control_ids), None
        )
        return self._chat.reasons and last == self._text.control_tokens[THINK]

    def _answer(
        self,
        body: ChatCompletionBody,
        said: Conversation,
        opening: tuple[int, ...],
        *,
        thinking: bool,
    ) -> Callable[[], Answer]:
        """Return the function that makes the reader of one choice."""
        chat, text, budget = self._chat, self._text, said.budget
        if budget is None and not (body.presence_penalty or body.frequency_penalty):
            budget = self._config.thinking_budget  # penalties would forget the reasoning when it is cut
        if opening and thinking and (body.presence_penalty or body.frequency_penalty):
            raise bad_request(
                "tool_choice with thinking cannot be combined with presence_penalty or frequency_penalty, which "
                "would forget the reasoning when the call is opened; leave one of them out",
                param="tool_choice",
            )

        def answer() -> Answer:
            return Answer(
                text,
                chat.parser(tools=said.callable, thinking=thinking, single=said.single),
                stop=_stops(body),
                include_stop=bool(body.include_stop_str_in_output),
                skip_special=body.skip_special_tokens is not False,
                min_tokens=body.min_tokens or 0,
                budget=budget,
                closing=(text.control_tokens[THOUGHT],) if chat.reasons else (),
                opening=opening if thinking else (),
                opened=() if thinking else opening,
                must_call=said.must_call,
            )

        return answer

    async def completion(self, body: CompletionBody, status: EngineStatus, request_id: str) -> Admitted:
        """Turn prompts into jobs.

        Raises:
            ApiError: the prompts cannot be run; the message says what to change.
        """
        model = self._model(body, status)
        if body.max_tokens == 0 and not body.echo:
            raise bad_request(
                "max_tokens must be at least 1, or 0 together with echo, to get the prompt back with its "
                "log-probabilities",
                param="max_tokens",
            )
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise bad_request(
                "best_of must be n or null: use n, and choose among the answers yourself", param="best_of"
            )
        sources = body.prompts()
        if len(sources) > self._config.max_prompts:
            raise bad_request(
                f"prompt has {len(sources)} prompts; this server takes at most {self._config.max_prompts} "
                "in one request",
                param="prompt",
            )
        many = len(sources) > 1
        prompts = [
            cut(
                await self.prompts.text(
                    source,
                    f"prompt[{index}]" if many else "prompt",
                    echo=bool(body.echo),
                    size=model.vocab_size,
                    context=context_of(body, model),
                ),
                body,
                model,
                self._text,
                body.max_tokens,
            )
            for index, source in enumerate(sources)
        ]
        ends: tuple[int, ...] = ()
        if body.suffix:
            if self._infill is None:
                raise bad_request(
                    "suffix must be null: this model's vocabulary has no marks for filling in the middle",
                    param="suffix",
                )
            if body.echo:
                raise bad_request("suffix needs echo to be false", param="echo")
            ends, marks = self._infill.ends, self._infill
            prompts = [
                Prompt(marks.prompt(prompt.token_ids, body.suffix, self._text), "") for prompt in prompts
            ]
        return self._work(
            body,
            model,
            request_id,
            ends=ends,
            prompts=prompts,
            max_tokens=body.max_tokens,
            logprobs=body.logprobs or 0 if body.logprob_token_ids else body.logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
            prompt_logprobs_start=logprob_start(body, prompts),
            enforced=None if body.max_tokens == 0 else await self._enforced(body, model),
        )

    def _model(self, body: GenerationBody, status: EngineStatus) -> ModelInfo:
        """Check the fields that do not depend on the prompt. Return the model that the engine has loaded."""
        self.prompts.check_name(body.model)
        if body.n is not None and body.n > self._config.max_n:
            raise bad_request(f"n must be at most {self._config.max_n} on this server", param="n")
        if (body.priority or 0) < self._config.min_priority:
            raise bad_request(
                f"priority must be at least {self._config.min_priority} on this server, where lower is earlier; "
                "--min-priority sets it",
                param="priority",
            )
        if body.stream_options is not None and not body.stream:
            raise bad_request("stream_options needs stream to be true", param="stream_options")
        if body.prompt_logprobs is not None and body.stream:
            raise bad_request("prompt_logprobs needs stream to be false", param="prompt_logprobs")
        model = loaded_model(status)
        check_counts(body, self._config.max_logprobs, model.vocab_size)
        return model

    def _work(
        self,
        body: GenerationBody,
        model: ModelInfo,
        request_id: str,
        *,
        prompts: Sequence[Prompt],
        max_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
        prompt_logprobs_start: int = 0,
        answer: Callable[[], Answer] | None = None,
        enforced: Enforced | None = None,
        ends: Sequence[int] = (),
    ) -> Admitted:
        sparsity, own = granted(body, model, self._config.default_top_k), self._config.sampling
        bias = tuple((int(key), value) for key, value in (body.logit_bias or {}).items())
        size = model.vocab_size
        check_ids([token_id for token_id, _ in bias], "logit_bias", size, keys=True)
        check_ids(body.stop_token_ids or [], "stop_token_ids", size)
        named = named_tokens(body, size, logprobs)
        stop_ids = dict.fromkeys(body.stop_token_ids or [])
        if not body.ignore_eos:
            stop_ids |= dict.fromkeys((*self._text.eos_token_ids, *ends))
        stop_ids = dict.fromkeys(token_id for token_id in stop_ids if token_id < size)
        prompt_only = max_tokens == 0
        n = body.n or 1
        asked = [
            whole_count(count, size) for count in (prompt_logprobs, body.prompt_logprobs) if count is not None
        ]
        if body.prompt_logprobs is not None:
            prompt_logprobs_start = 0
        options = body.stream_options
        jobs: list[Job] = []
        for prompt in prompts:
            room = room_of(prompt, model, self._text, max_tokens, self._config.default_max_tokens)
            check_least(body, room)
            seed = secrets.randbits(64) if body.seed is None else body.seed % 2**64
            for choice in range(n):
                sampling = SamplingParams(
                    max_tokens=room,
                    seed=_derive(seed, choice),
                    temperature=_temperature(_default(body.temperature, own.temperature)),
                    top_p=_default(body.top_p, own.top_p),
                    top_k=min(max(_default(body.top_k, own.top_k), 0), size),
                    min_p=_default(body.min_p, own.min_p),
                    presence_penalty=_default(body.presence_penalty, 0.0),
                    frequency_penalty=_default(body.frequency_penalty, 0.0),
                    repetition_penalty=_default(body.repetition_penalty, own.repetition_penalty),
                    logit_bias=bias,
                    stop_token_ids=() if prompt_only else tuple(stop_ids),
                    logprobs=None if prompt_only or logprobs is None else whole_count(logprobs, size),
                    logprob_token_ids=named,
                    min_tokens=0 if prompt_only else body.min_tokens or 0,
                    prompt_logprobs=max(asked, default=None),
                    prompt_logprobs_start=prompt_logprobs_start,
                )
                index = len(jobs)
                submit = Submit(
                    request_id=f"{request_id}-{index}",
                    prompt_token_ids=prompt.token_ids,
                    sampling=sampling,
                    index_top_k=sparsity.index_top_k,
                    grammar=None if enforced is None else Grammar(text=enforced.whole),
                    cache_salt=body.cache_salt or "",
                    priority=body.priority or 0,
                )
                jobs.append(
                    Job(
                        index,
                        submit,
                        _stops(body),
                        prompt_only,
                        answer,
                        thinks=answer is not None and self._chat.reasons,
                        stop_tokens=frozenset(body.stop_token_ids or ()),
                        rest=None if enforced is None else Grammar(text=enforced.rest),
                        shares_prompt=choice > 0,
                        include_stop=bool(body.include_stop_str_in_output),
                        skip_special=body.skip_special_tokens is not False,
                        shows_tokens=bool(
                            body.return_token_ids or (options and options.continuous_usage_stats)
                        ),
                        shows_stop=bool(body.return_token_ids),
                    )
                )
        echoes = tuple(prompt.text for prompt in prompts for _ in range(n))
        return Admitted(tuple(jobs), echoes, sparsity, timeout=body.timeout)


def _derive(seed: int, choice: int) -> int:
    """The seed of one choice. Choice 0 keeps the request's seed, so a larger n does not change its text."""
    if not choice:
        return seed
    digest = hashlib.blake2b(f"{seed}/{choice}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _stops(body: GenerationBody) -> tuple[str, ...]:
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())


def _temperature(wanted: float) -> float:
    """A temperature that float32 has; a smaller one draws the likeliest token, as 0 does."""
    return wanted if wanted >= SMALLEST_TEMPERATURE else 0.0


def _default(value: T | None, default: T) -> T:
    return default if value is None else value
