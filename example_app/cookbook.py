"""The recipes: read once from a file, searched in memory."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Cookbook", "Ingredient", "Recipe"]


@dataclass(frozen=True)
class Ingredient:
    """``amount`` is as a cook writes it, and may be empty."""

    amount: str
    item: str

    def __str__(self) -> str:
        return f"{self.amount} {self.item}".strip()


@dataclass(frozen=True)
class Recipe:
    slug: str
    title: str
    summary: str
    minutes: int
    serves: int
    ingredients: tuple[Ingredient, ...]
    method: tuple[str, ...]

    @property
    def as_text(self) -> str:
        """The recipe as a model reads it."""
        ingredients = ", ".join(map(str, self.ingredients))
        return f"{self.title}. Ingredients: {ingredients}. Method: {' '.join(self.method)}"


class Cookbook:
    def __init__(self, recipes: list[Recipe]) -> None:
        self._recipes = {recipe.slug: recipe for recipe in recipes}

    @classmethod
    def load(cls, path: Path) -> Cookbook:
        return cls(
            [
                Recipe(
                    slug=entry["slug"],
                    title=entry["title"],
                    summary=entry["summary"],
                    minutes=entry["minutes"],
                    serves=entry["serves"],
                    ingredients=tuple(Ingredient(*pair) for pair in entry["ingredients"]),
                    method=tuple(entry["method"]),
                )
                for entry in json.loads(path.read_text("utf-8"))
            ]
        )

    def get(self, slug: str) -> Recipe | None:
        return self._recipes.get(slug)

    def search(self, text: str) -> list[Recipe]:
        """Recipes that have *text* in their title or an ingredient; all for ``""``."""
        wanted = text.casefold().strip()
        return [
            recipe
            for recipe in self._recipes.values()
            if wanted in " ".join((recipe.title, *(i.item for i in recipe.ingredients))).casefold()
        ]

    def using(self, text: str) -> list[tuple[Recipe, list[str]]]:
        """Recipes with an ingredient that *text* names, best match first."""
        wanted = _stems(text)
        found = []
        for recipe in self._recipes.values():
            items = [i.item for i in recipe.ingredients if wanted & _stems(i.item)]
            if items:
                found.append((recipe, items))
        return sorted(found, key=lambda match: -len(match[1]))


def _stems(text: str) -> set[str]:
    """The words without a plural's ending: "leeks" finds "leek", "potato" "potatoes"."""
    words = re.findall(r"\w{3,}", text.casefold())
    return {re.sub(r"(?<=o)es$|s$", "", word) for word in words}
