"""Errors that cross the engine's face. Every message is one sentence that says what to change."""

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
    """The engine is not (or not yet, or no longer) taking requests."""


class RankError(EngineError):
    """One of the processes that compute the model together has failed, and with it all of them."""


class ProtocolError(EngineError):
    """The other side of the socket sent something that is not a message."""
