"""What is said when the Hugging Face hub does not give a model's files, in one sentence that says what to do."""

from __future__ import annotations

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from server.hub.repository import RepositoryName
from server.hub.wheels import DownloadError


def may_be_back_later(error: Exception) -> bool:
    """Whether an error says nothing about the repository: no network, or a hub in trouble."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500 or error.response.status_code == 429
    return True


def unreachable(name: RepositoryName, error: Exception) -> DownloadError:
    """Say in one sentence that nobody answers, and that the cache does not help."""
    if constants.HF_HUB_OFFLINE:
        return DownloadError(
            f"{name} is not in the cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE forbids to fetch it: run "
            f"`dsa pull {name}` once without it"
        )
    return DownloadError(
        f"{name} is neither a file or folder here nor in the cache ({constants.HF_HUB_CACHE}), and the hub cannot be reached "
        f"at {constants.ENDPOINT} ({_reason(error)}): check the network, or set HF_ENDPOINT to a mirror"
    )


def refusal(name: RepositoryName, error: Exception) -> DownloadError:
    """Say in one sentence why the hub does not give the files."""
    page = f"{constants.ENDPOINT}/{name.repository}"
    token = huggingface_hub.get_token()
    if isinstance(error, GatedRepoError):
        if token:
            return DownloadError(
                f"{name.repository} is gated, and the token (HF_TOKEN) is not let in: ask for access at {page}"
            )
        return DownloadError(
            f"{name.repository} is gated: ask for access at {page}, then set HF_TOKEN to a token of that account"
        )
    if isinstance(error, RepositoryNotFoundError):
        who = "with the token that is set" if token else "without a token"
        return DownloadError(
            f"{name.repository} is no file or folder here, and {constants.ENDPOINT} has no model of that name to see {who}: "
            "check the name" + (", or the rights of the token" if token else "; a private one needs HF_TOKEN")
        )
    if isinstance(error, RevisionNotFoundError):
        return DownloadError(
            f"{name.repository} has no revision {name.revision!r}; its branches, tags and commits are at {page}/commits/main"
        )
    if isinstance(error, DisabledRepoError):
        return DownloadError(f"the hub has disabled {name.repository}; name another repository")
    if isinstance(error, HfHubHTTPError) and error.response.status_code == 401:
        return DownloadError(
            f"{constants.ENDPOINT} refuses the token in HF_TOKEN: make a new one, or unset it"
        )
    return DownloadError(
        f"{name} could not be fetched from {constants.ENDPOINT} ({_reason(error)}); run the command again: it goes on where "
        "it stopped"
    )


def _reason(error: Exception) -> str:
    if isinstance(error, HfHubHTTPError):
        return f"HTTP {error.response.status_code}"
    return str(error).splitlines()[0] if str(error) else type(error).__name__
