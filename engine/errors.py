"""The errors that the engine's callers see. Every message is one sentence that says what to change."""

from __future__ import annotations


class EngineError(Exception):
    """Base of every error that the engine raises on purpose."""


class ConfigError(EngineError):
    """The engine cannot start with these settings."""


class CheckpointError(EngineError):
    """A model's files are missing, damaged, or of an architecture that the engine does not know."""


class EngineDiedError(EngineError):
    """The engine process ended while requests were waiting for it."""


class EngineUnavailableError(EngineError):
    """The engine takes no requests: not yet, not now or not any more."""


class RankError(EngineError):
    """One of the processes that compute the model together has failed, so none of them can go on."""


class ProtocolError(EngineError):
    """The other side of the socket sent something that is not a message."""


GRAMMAR_FAULT = "the grammar cannot be enforced"
"""The error of a request begins so if its grammar is at fault."""


class GrammarError(EngineError):
    """A grammar is wrong, asks for what cannot be enforced, or takes too much."""
