"""`qat recipe`: list, show, copy, schema."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.table import Table

from qat.cli.group import main
from qat.cli.options import RECIPE, NonEmptyPath, set_option
from qat.cli.terminal import StandardOutput


@main.group()
def recipe() -> None:
    """List, show and copy recipes, or print their JSON schema."""


@recipe.command("list")
def recipe_list() -> None:
    """List the packaged recipes, one per line."""
    from qat.recipe.files import recipe_names
    from qat.recipe.loading import load_recipe

    table = Table(box=None, pad_edge=False)
    for heading in ("name", "task", "network", "data"):
        table.add_column(heading)
    for name in recipe_names():
        content = load_recipe(name).recipe
        table.add_row(name, content.task, f"BNext {content.model.size}", content.data.dataset)
    StandardOutput().print(table)


@recipe.command("show")
@click.argument("name", type=RECIPE)
@click.option("--resolved", is_flag=True, help="Write out every default; comments are lost.")
@set_option("Override one key; implies --resolved.")
def recipe_show(name: str, resolved: bool, overrides: tuple[str, ...]) -> None:
    """Print a recipe."""
    from qat.recipe.loading import load_recipe, recipe_yaml

    loaded = load_recipe(name, overrides)
    if resolved or overrides:
        click.echo(recipe_yaml(loaded.recipe), nl=False)
    else:
        click.echo(loaded.path.read_text(encoding="utf-8"), nl=False)


@recipe.command("copy")
@click.argument("name", type=RECIPE)
@click.argument("destination", type=NonEmptyPath(), default=".")
@click.option("--force", is_flag=True, help="Replace an existing file.")
def recipe_copy(name: str, destination: Path, force: bool) -> None:
    """Copy a packaged recipe to DESTINATION (a folder or a file) as a start for your own."""
    from qat.recipe.files import copy_recipe

    click.echo(copy_recipe(name, destination, force))


@recipe.command("schema")
def recipe_schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from qat.recipe.loading import recipe_schema as schema

    click.echo(json.dumps(schema(), indent=2))
