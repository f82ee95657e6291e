"""How sparse attention is for a request: what it asks for, as far as the model can grant it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.protocol import ModelInfo
from server.http.protocol.errors import bad_request
from server.http.protocol.sampling import GenerationBody


@dataclass(frozen=True, slots=True)
class GrantedSparsity:
    """How sparse attention is for a request.

    Attributes:
        index_top_k: what the engine gets: tokens that attention may read; None is dense.
        requested: the client's number if it was not granted, else None.
        chosen: the request has said how sparse it wants attention to be.
        possible: the model can be sparse at all.
    """

    index_top_k: int | None
    requested: int | None = None
    chosen: bool = False
    possible: bool = True


def granted(
    body: GenerationBody, model: ModelInfo, default: int | Literal["dense"] | None
) -> GrantedSparsity:
    """Return how sparse attention is; `default` is the server's own wish, which comes before the indexer's.

    Raises:
        ApiError: the request asks for more than the context has.
    """
    asked = body.dsa.top_k if body.dsa is not None else None
    if isinstance(asked, int) and asked > model.max_model_len:
        raise bad_request(
            f"dsa.top_k must be between 1 and the model's context of {model.max_model_len} tokens, "
            f"or 'dense'; it is {asked}",
            param="dsa.top_k",
        )
    if model.indexer is None:
        return GrantedSparsity(None, requested=asked if isinstance(asked, int) else None, possible=False)
    wanted = asked or default or model.indexer.default_index_top_k
    return GrantedSparsity(
        None if wanted == "dense" else min(wanted, model.max_model_len), chosen=asked is not None
    )
