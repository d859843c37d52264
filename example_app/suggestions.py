"""The suggestions that were kept, in SQLite."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Suggestion", "Suggestions"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS suggestions (
    id INTEGER PRIMARY KEY,
    recipe TEXT NOT NULL,
    prompt TEXT NOT NULL,
    answer TEXT NOT NULL,
    created_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP
)
"""


@dataclass(frozen=True)
class Suggestion:
    """What was asked about a recipe, and the answer."""

    prompt: str
    answer: str


class Suggestions:
    """
    The kept answers. `recipe` is a slug, or ``""`` for an answer about none.

    Thread safety: every call opens a connection of its own, so call from anywhere.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with closing(self._connect()) as connection:
            connection.execute(_SCHEMA)

    def keep(self, recipe: str, prompt: str, answer: str) -> None:
        with closing(self._connect()) as connection, connection:
            connection.execute(
                "INSERT INTO suggestions (recipe, prompt, answer) VALUES (?, ?, ?)",
                (recipe, prompt, answer),
            )

    def about(self, recipe: str) -> list[Suggestion]:
        """The newest three."""
        with closing(self._connect()) as connection:
            rows = connection.execute(
                "SELECT prompt, answer FROM suggestions WHERE recipe = ? ORDER BY id DESC LIMIT 3",
                (recipe,),
            )
            return [Suggestion(*row) for row in rows]

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=5)
