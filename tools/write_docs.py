"""Write the pages that are generated from code: docs/configuration.md, schema.json, migrate/."""

import json
from pathlib import Path

from penstock.config.reference import json_schema, markdown_reference
from penstock.files import atomic_write
from penstock.migrate.pages import pages

DOCS = Path(__file__).resolve().parent.parent / "docs"

if __name__ == "__main__":
    atomic_write(DOCS / "configuration.md", markdown_reference())
    atomic_write(DOCS / "schema.json", json.dumps(json_schema(), indent=1) + "\n")
    for name, text in pages().items():
        atomic_write(DOCS / "migrate" / name, text)
