"""The project's addresses, and the README as a package index shows it: there, links that are
relative to the repository lead nowhere.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(!?)(\[[^\]]*\]\()(?!https?://|#)([^)\s]+)\)")


class Addresses(MetadataHookInterface):
    """Fills in `urls` and `readme` from the repository that pyproject.toml names."""

    def update(self, metadata: dict[str, Any]) -> None:
        repository = self.config["repository"]
        metadata["urls"] = {
            "Source": repository,
            "Documentation": f"{repository}/tree/main/docs",
            "Changelog": f"{repository}/blob/main/CHANGELOG.md",
            "Issues": f"{repository}/issues",
        }
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": absolute(text, repository)}


def absolute(text: str, repository: str) -> str:
    """A text in Markdown with its relative links turned into those of a repository's main branch;
    an image needs the address of the file itself instead of the page that shows it.
    """

    def replaced(link: re.Match[str]) -> str:
        image, label, path = link.groups()
        return f"{image}{label}{repository}/{'raw' if image else 'blob'}/main/{path})"

    return LINK.sub(replaced, text).replace("THIS-REPOSITORY", repository)
