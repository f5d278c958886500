import re
from dataclasses import fields
from pathlib import Path

from training.learn.recipe import KINDS
from training.learn.recipe_table import key_meanings, page


def test_page_of_recipes_is_current() -> None:
    """Otherwise run: python -m training.learn.recipe_table > training/recipes/README.md"""
    assert Path("training/recipes/README.md").read_text() == page()


def test_every_key_of_every_kind_has_a_meaning() -> None:
    sections = page().split("## kind = ")[1:]
    for section, (name, kind) in zip(sections, KINDS.items(), strict=True):
        assert section.startswith(f'"{name}"')
        listed = set(re.findall(r"^\| `(\w+)`", section, re.M))
        wanted = {*kind.top, *kind.model, *(field.name for _, part in kind.parts.values() for field in fields(part))}
        assert wanted <= listed
        assert not re.search(r"\|  *\|$", section, re.M)


def test_unit_and_default_of_a_key_are_those_of_its_field() -> None:
    assert "| `warmup_images` | `0` | images | Linear warm-up of the learning rate. |" in page()
    assert key_meanings(KINDS["finetune"].recipe)["seed"].startswith("Seed of the weights")
