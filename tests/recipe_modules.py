"""The modules of a recipe, which lie in no package."""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

from mmpt.catalogue import recipes_folder


@contextmanager
def recipe_modules(recipe: str) -> Iterator[Callable[[str], ModuleType]]:
    """Import modules of a recipe by name, without leaving them on the path for others of the same name."""
    folder = str(recipes_folder() / recipe)
    before = set(sys.modules)
    sys.path.insert(0, folder)
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(folder)
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(folder):
                del sys.modules[name]
