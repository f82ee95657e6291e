"""The error that every chat format raises."""


class PromptError(ValueError):
    """The messages cannot become a prompt; the error's text is one sentence for the client."""
