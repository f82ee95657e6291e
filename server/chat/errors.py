"""The error of this package."""


class PromptError(ValueError):
    """Messages that cannot be made into a prompt; the message is one sentence for the client."""
