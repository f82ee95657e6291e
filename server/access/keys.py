"""Keys of callers: a file with a record for each, which is read again when it changes.

The file has no secret, only SHA-256 digests. A password needs a slow hash, because people choose passwords that can be
guessed. A secret from `new_secret` has 256 random bits: nobody can try them all, however fast the hash is. A slow hash would
only let strangers keep this server busy, since each request with any key costs one. (OWASP's Password Storage Cheat Sheet
is about passwords; NIST SP 800-63B, 5.1.2.2, asks for slow hashing only of secrets under 112 bits.)
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

_log = logging.getLogger(__name__)

Role = Literal["user", "admin", "metrics"]
ANONYMOUS = "anonymous"
MAX_KEYS = 4096
"""Records of one file. A request compares its key with all of them: a few tenths of a millisecond for 1,000."""

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}"
_RESERVED = re.compile(r"anonymous|other|none|key-[0-9a-f]{16}")


class KeysError(ValueError):
    """A file of keys is not valid, or cannot be read; the message says where."""


def _moment(value: Any) -> Any:
    return datetime.combine(value, datetime.min.time(), UTC) if type(value).__name__ == "date" else value


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TopKRange(_Part):
    """How sparse a caller's requests may be.

    Attributes:
        min: the smallest `dsa.top_k`.
        max: the largest; None: the model's context.
        dense: whether `dense` is allowed, which costs more than any number.
    """

    min: Annotated[int, Field(ge=1)] = 1
    max: Annotated[int, Field(ge=1)] | None = None
    dense: bool = True

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max is not None and self.max < self.min:
            raise ValueError("max is less than min")
        return self

    def nearest(self, index_top_k: int | None) -> int | None:
        """The allowed sparsity that is nearest to one; None is dense."""
        if index_top_k is None and (self.dense or self.max is None):
            return None
        if index_top_k is None:
            return self.max
        return max(min(index_top_k, index_top_k if self.max is None else self.max), self.min)

    def allows(self, index_top_k: int | None) -> bool:
        """Whether a request may be so sparse."""
        return self.dense if index_top_k is None else self.nearest(index_top_k) == index_top_k

    def __str__(self) -> str:
        """What is allowed, for a client."""
        numbers = f"{self.min} or more" if self.max is None else f"{self.min} to {self.max}"
        return f"{numbers}, or dense" if self.dense else f"{numbers}, and not dense"


class Budget(_Part):
    """How much money a caller may spend.

    Attributes:
        usd: the amount, a decimal in quotes.
        period: `total`, or anew each `month` or `day` of UTC.
    """

    usd: Annotated[str, Field(pattern=r"^[0-9]{1,9}(\.[0-9]{1,9})?$")]
    period: Literal["total", "month", "day"] = "total"

    @property
    def nanos(self) -> int:
        """The amount in nano-dollars."""
        return int(Decimal(self.usd) * 10**9)


class KeyRecord(_Part):
    """What a file says of one caller.

    Attributes:
        name: stands for the caller in logs, metrics and the ledger.
        sha256: digests of the secrets that are this caller's, in hexadecimal; several while one replaces another.
        role: `user` generates, `admin` changes settings, `metrics` reads /metrics. An admin reads /metrics, too.
        namespace: callers with one namespace share cached prompts; None: nobody shares this caller's.
        created: when the key was made.
        expires: from then on the key is refused.
        requests_per_minute: None: any number.
        tokens_per_minute: of prompts and answers; None: any number.
        concurrent: requests at once; None: any number.
        top_k: how sparse requests may be; None: as they like.
        budget: None: any amount.
        priority: added to the `priority` of each request; lower is earlier.
    """

    name: Annotated[str, Field(pattern=f"^{_NAME}$")]
    sha256: Annotated[tuple[Annotated[str, Field(pattern="^[0-9a-f]{64}$")], ...], Field(min_length=1)]
    role: Role = "user"
    namespace: Annotated[str, Field(pattern=f"^{_NAME}$")] | None = None
    created: Annotated[datetime, BeforeValidator(_moment)] | None = None
    expires: Annotated[datetime, BeforeValidator(_moment)] | None = None
    requests_per_minute: Annotated[int, Field(ge=1)] | None = None
    tokens_per_minute: Annotated[int, Field(ge=1)] | None = None
    concurrent: Annotated[int, Field(ge=1)] | None = None
    top_k: TopKRange | None = None
    budget: Budget | None = None
    priority: Annotated[int, Field(ge=-(2**20), le=2**20)] = 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if _RESERVED.fullmatch(self.name):
            raise ValueError(f"the name {self.name!r} has a meaning of its own; choose another")
        if self.expires is not None and self.expires.tzinfo is None:
            raise ValueError("expires needs a time zone, such as 2027-01-01T00:00:00Z")
        return self


class KeyTable(_Part):
    """The content of a file of keys."""

    keys: Annotated[tuple[KeyRecord, ...], Field(max_length=MAX_KEYS)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [record.name for record in self.keys]
        digests = [digest for record in self.keys for digest in record.sha256]
        for what, values in (("name", names), ("sha256", digests)):
            if len(set(values)) < len(values):
                raise ValueError(f"two keys have the same {what}")
        return self


def new_secret() -> str:
    """Make a secret with 256 random bits. It is in no file: who loses it needs another one."""
    return f"sk-dsa-{secrets.token_urlsafe(32)}"


def digest_of(secret: str) -> str:
    """The digest that stands for a secret, in hexadecimal: `printf %s SECRET | sha256sum` says the same."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def read_keys(path: Path) -> KeyTable:
    """Read and check a file of keys, YAML or JSON.

    Raises:
        KeysError: the file cannot be read, or its content is wrong. The message has nothing of the content but names of
            fields.
    """
    try:
        return KeyTable.model_validate(yaml.safe_load(path.read_text("utf-8")))
    except OSError as error:
        raise KeysError(
            f"the file of keys {path} cannot be read: {error.strerror}; dsa keys new NAME --keys FILE makes one"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        raise KeysError(f"the file of keys {path} is not YAML{where}") from error
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in problem["loc"]) or "its top"
        raise KeysError(f"the file of keys {path} is wrong at {place}: {problem['msg']}") from error


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request.

    Attributes:
        name: in logs, metrics and the ledger.
        record: what the file of keys says; None: the server has no such file, and believes everybody.
    """

    name: str
    record: KeyRecord | None = None

    @property
    def namespace(self) -> str:
        """What the salts of this caller's cached prompts begin with. No two callers have the same, unless told so."""
        if self.record is not None and self.record.namespace is not None:
            return f"+{self.record.namespace}"  # no name begins so
        return "" if self.name == ANONYMOUS else self.name

    def salt(self, own: str) -> str:
        """The salt under which a prompt is cached: of the namespace and of the request's own salt.

        A name has no slash, so two different pairs never give the same.
        """
        return f"{self.namespace}/{own}" if own or self.namespace else ""


def unverified(secret: str | None) -> Caller:
    """The caller of a server without keys: named by a digest of whatever was sent, or `anonymous`."""
    if not secret:
        return Caller(ANONYMOUS)
    digest = hashlib.blake2b(secret.encode("utf-8", "surrogatepass"), digest_size=8, person=b"dsa-key")
    return Caller(f"key-{digest.hexdigest()}")


class KeyBook:
    """The keys that are valid now. If an edit of their file is wrong, the old ones stay and the error is told.

    Attributes:
        table: the content of the file.
        problem: why the newest edit is not in force; None: it is.
        errors: how many edits were refused.
    """

    def __init__(self, path: Path, *, has_ledger: bool = True) -> None:
        """Read the file. Raises the errors of `read_keys`. Without a ledger no key may have a budget."""
        self._path, self._has_ledger = path, has_ledger
        self._stamp = self._look()
        self.problem: str | None = None
        self.errors = 0
        self._take(self._read())

    def refresh(self) -> None:
        """Read the file again if it changed; never raises. Any thread may call it, one at a time."""
        stamp = self._look()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            table = self._read()
        except KeysError as error:
            self.errors += 1
            self.problem = (
                "the file of keys has an edit that was refused, so the keys from before are in force"
            )
            _log.error("%s; the keys from before stay in force", error)
            return
        self._take(table)
        self.problem = None
        _log.warning("%d keys are in force", len(table.keys))

    def _read(self) -> KeyTable:
        table = read_keys(self._path)
        rich = next((record for record in table.keys if record.budget is not None), None)
        if rich is not None and not self._has_ledger:
            raise KeysError(
                f"the key {rich.name} has a budget, but there is no ledger to remember what was spent; name one with --ledger"
            )
        return table

    def find(self, secret: str, now: datetime | None = None) -> KeyRecord | None:
        """The record whose secret this is; None: there is none, or it has expired.

        Every digest is compared, each in constant time, whether or not one was right already: the time says nothing
        about how near a guess was.
        """
        digest = hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()
        found: KeyRecord | None = None
        for known, record in self._digests:
            if hmac.compare_digest(known, digest):
                found = record
        if found is not None and found.expires is not None and found.expires <= (now or datetime.now(UTC)):
            return None
        return found

    def _take(self, table: KeyTable) -> None:
        self.table = table
        # Replaced as a whole, so that a request sees either all old keys or all new ones.
        self._digests: Sequence[tuple[bytes, KeyRecord]] = [
            (bytes.fromhex(digest), record) for record in table.keys for digest in record.sha256
        ]
        if not table.keys:
            _log.warning("the file of keys %s has no key, so every request is refused", self._path)

    def _look(self) -> tuple[int, ...]:
        try:
            found = self._path.stat()
        except OSError:
            return ()
        if found.st_mode & stat.S_IWOTH:
            _log.warning("everybody on this host may write the file of keys %s; chmod 600 it", self._path)
        return found.st_mtime_ns, found.st_size, found.st_ino
