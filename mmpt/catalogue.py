"""The recipes that ship with mmpt: list and copy them."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

from mmpt.errors import ConfigError

ABOUT = "about.yaml"


def recipes_folder() -> Path:
    """Where the recipes lie: `recipes/` of a checkout, or `mmpt/recipes` of an installed wheel."""
    spec = find_spec("mmpt.recipes")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))


def recipe_names() -> list[str]:
    """The domains that have a recipe."""
    return sorted(path.parent.name for path in recipes_folder().glob(f"*/{ABOUT}"))


def recipe_folder(domain: str) -> Path:
    """The folder of one recipe.

    Raises:
        ConfigError: there is none for this domain.
    """
    if domain not in recipe_names():
        raise ConfigError(f"there is no recipe {domain!r}; there are: {', '.join(recipe_names())}")
    return recipes_folder() / domain


def print_recipes() -> None:
    """A table of domain, paper, data and what is measured."""
    import yaml
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Recipes (`mmpt recipes copy DOMAIN FOLDER` gives you the files)", title_justify="left")
    columns = ("paper", "data", "measures")
    for column in ("domain", *columns):
        table.add_column(column)
    for name in recipe_names():
        about = yaml.safe_load((recipes_folder() / name / ABOUT).read_text(encoding="utf-8"))
        table.add_row(name, *(str(about[column]) for column in columns))
    Console().print(table)


def copy_recipe(domain: str, folder: Path) -> list[Path]:
    """Copy a recipe's files.

    Raises:
        ConfigError: the folder exists and is not empty.
    """
    source = recipe_folder(domain)
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty; give a new folder, so that nothing is overwritten")
    folder.mkdir(parents=True, exist_ok=True)
    copied = []
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name != "__init__.py":
            copied.append(Path(shutil.copy(path, folder / path.name)))
    return copied
