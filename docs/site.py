"""What building the site needs: the tutorial's page from its notebook, every op, and examples as examples.

Used by mkdocs.yml (`hooks`, and `extensions` of mkdocstrings).
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File


def on_files(files: Any, config: Any) -> Any:
    """Add `tutorial.md`, made of the cells of `tutorial.ipynb`."""
    notebook = json.loads((Path(config.docs_dir) / "tutorial.ipynb").read_text())
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    parts.insert(1, "This page is a [notebook](tutorial.ipynb) that the tests run.")
    files.append(File.generated(config, "tutorial.md", content="\n\n".join(parts)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The reference of the ops has all that `any2point.ops` exports: functions, then results and weights."""
    if page.file.src_uri != "api/ops.md":
        return markdown
    tree = ast.parse((Path(__file__).parents[1] / "any2point" / "ops" / "__init__.py").read_text())
    (exported,) = (node.value for node in tree.body if isinstance(node, ast.Assign))  # __all__
    names = sorted(ast.literal_eval(exported), key=lambda name: (name[0].isupper(), name))
    return "\n\n".join([markdown, *(f"::: any2point.ops.{name}" for name in names)])


class ExampleSections(griffe.Extension):
    """The docstrings say `Example:`; as `Examples:` they are shown as code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
