"""The SQLite file of a ledger, watched: a connection goes on writing into a file that nobody can find any more."""

from __future__ import annotations

import os
from pathlib import Path

from sqlalchemy.engine import make_url


class WatchedFile:
    """Tells whether a path still leads to the file that was there at first, by its device and inode.

    Args:
        path: of a file that exists.

    Raises:
        OSError: it does not.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        found = path.stat()
        self._first = found.st_dev, found.st_ino

    def lost(self) -> str | None:
        """Why rows that are written now would not be found; None: they would be."""
        try:
            found = os.stat(self._path)
        except FileNotFoundError:
            return f"{self._path} was removed while the server runs; put it back, or restart the server to make a new one"
        except OSError as error:
            return f"{self._path} cannot be looked at: {error.strerror}"
        if (found.st_dev, found.st_ino) != self._first:
            return (
                f"another file is at {self._path} since the server started; put the first one back, or restart the server "
                "to go on with this one"
            )
        return None


def sqlite_path(where: str) -> Path | None:
    """The file of a ledger; None: it is in no file, or in another server's."""
    if "://" not in where:
        return Path(where).expanduser()
    url = make_url(where)
    if url.get_backend_name() != "sqlite" or not url.database or url.database == ":memory:":
        return None
    return Path(url.database)
