"""Recipes: everything one training run needs, as YAML that is checked in full before any weight is loaded.

`schema` holds the types with their defaults and rules, `files` reads a YAML file with overrides from the command line.
"""

from lusifer.recipes.files import load_recipe
from lusifer.recipes.schema import Recipe

__all__ = ["Recipe", "load_recipe"]
