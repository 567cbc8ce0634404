"""The lines that were met and those that were answered: kept on disk, as there may be millions."""

import sqlite3
import threading
from hashlib import blake2b

Key = str | int  # a custom_id, or the number of a line that has none of its own


class Keys:
    """Two sets of keys in a temporary database, which ends with the process. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Without a name it lies in memory while it is small, then in a file that has been deleted.
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._database.execute("PRAGMA journal_mode = OFF")
        for name in ("met", "answered"):
            self._database.execute(f"CREATE TABLE {name} (key PRIMARY KEY) WITHOUT ROWID")
        self._database.execute("BEGIN")  # one transaction: each would write to the disk

    def meet(self, key: Key) -> bool:
        """Add the key of a line that is read; return False if an earlier line has it."""
        return self._add("met", key)

    def answer(self, key: Key) -> bool:
        """Add the key of a line that is answered; return False if it was before."""
        return self._add("answered", key)

    def is_answered(self, key: Key) -> bool:
        with self._lock:
            query = "SELECT 1 FROM answered WHERE key = ?"
            return self._database.execute(query, (_stored(key),)).fetchone() is not None

    def _add(self, name: str, key: Key) -> bool:
        with self._lock:
            insert = f"INSERT OR IGNORE INTO {name} VALUES (?)"
            return self._database.execute(insert, (_stored(key),)).rowcount == 1


def _stored(key: Key) -> bytes | int:
    """Return the form of a key that is stored: of a text a digest, however long the text is."""
    if isinstance(key, int):
        return key
    return blake2b(key.encode(errors="surrogatepass"), digest_size=16).digest()
