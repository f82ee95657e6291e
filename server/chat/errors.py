"""The errors that chat formats raise."""


class PromptError(ValueError):
    """The messages cannot become a prompt; the error's text is one sentence for the client."""


class UnfitToolError(ValueError):
    """A strict tool cannot be enforced in the model's format; the error's text says why."""
