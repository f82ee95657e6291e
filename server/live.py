"""Settings that change while the server runs, at an admin's word. A restart forgets them: what is to stay belongs in the file.

All of a change holds, or nothing of it: every value is checked before the first is used. Each is told to the log of the
server, with the name of the key, whatever the level of the log is.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec

from server.config import ServerConfig
from server.generation.admission import Admission
from server.generation.intake import Intake
from server.http.protocol.admin import Change, SettingsBody, SettingsNow
from server.money.pricing import PriceBook, parse_table

_audit = logging.getLogger("server.audit")
_audit.setLevel(logging.INFO)  # of its own, so that no change of the level silences it

KEPT_CHANGES = 200
_NAMES = {"max_tokens": "default_max_tokens", "top_k": "default_top_k"}
"""Fields of the body that have another name in the config."""


class LiveSettings:
    """The settings that are in force.

    Attributes:
        config: with all changes.
        changes: the newest ones, the newest last.
    """

    def __init__(self, config: ServerConfig, admission: Admission, intake: Intake, prices: PriceBook) -> None:
        self.config = config
        self.changes: deque[Change] = deque(maxlen=KEPT_CHANGES)
        self._admission, self._intake, self._prices = admission, intake, prices

    def now(self) -> SettingsNow:
        """What is in force."""
        config = self.config
        return SettingsNow(
            max_queue=config.max_queue,
            max_queue_tokens=config.max_queue_tokens,
            max_queue_seconds=config.max_queue_seconds,
            request_seconds=config.request_seconds,
            max_n=config.max_n,
            max_prompts=config.max_prompts,
            max_tokens=config.default_max_tokens,
            top_k=config.default_top_k,
            min_priority=config.min_priority,
            log_level=logging.getLevelName(logging.getLogger().level).lower(),
            price_version=self._prices.table.version,
        )

    def change(self, body: SettingsBody, *, key: str, request_id: str) -> list[Change]:
        """Use what a body says from now on. Returns what became different.

        Args:
            body: only the fields that were sent count.
            key: the name of the admin's key.
            request_id: of the request that brought the body.

        Raises:
            PriceError: the price table is not valid; nothing was changed.
        """
        sent = {
            name: getattr(body, name) for name in body.model_fields_set if name in SettingsBody.model_fields
        }
        table = sent.pop("prices", None)
        level = sent.pop("log_level", None)
        before = self.now().model_dump()
        if table is not None:
            self._prices.use(parse_table(table))
        if level is not None:
            logging.getLogger().setLevel(level.upper())
        self._use(sent)
        after = self.now().model_dump()
        at = datetime.now(UTC)
        made = [
            Change(at=at, key=key, request_id=request_id, setting=name, old=before[name], new=new)
            for name, new in after.items()
            if new != before[name]
        ]
        for one in made:
            self.changes.append(one)
            _audit.warning(
                "the admin %s changed %s from %s to %s",
                key,
                one.setting,
                one.old,
                one.new,
                extra={"fields": one.model_dump(mode="json")},
            )
        return made

    def _use(self, sent: Mapping[str, Any]) -> None:
        self.config = msgspec.structs.replace(
            self.config, **{_NAMES.get(name, name): value for name, value in sent.items()}
        )
        self._admission.limit = self.config.max_queue
        self._admission.max_tokens = self.config.max_queue_tokens
        self._admission.max_seconds = self.config.max_queue_seconds
        self._intake.use(self.config)
