"""
Write the tables of docs/ from the JSON files that runs left in benchmarks/results/: `make results`.

A file `NAME.json` fills the block between `<!-- results:NAME -->` and `<!-- /results:NAME -->` of any page in docs/.
It holds `title`, `command`, `commit`, `seed`, `columns`, `rows` (lists in the order of the columns) and `notes`. With
`--check` nothing is written, and the exit code says whether a page is out of step.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[1]
FIELDS = ("title", "command", "commit", "seed", "columns", "rows", "notes")
BLOCK = re.compile(r"(<!-- results:(?P<name>[\w.-]+) -->\n).*?(<!-- /results:(?P=name) -->)", re.DOTALL)


def read_result(path: Path) -> dict[str, Any]:
    """One result file, checked: every field there, every row as wide as the columns."""
    result = json.loads(path.read_text())
    missing = [name for name in FIELDS if name not in result]
    if missing:
        raise ValueError(f"{path.name} has no {', '.join(missing)}; a result has {', '.join(FIELDS)}.")
    for number, row in enumerate(result["rows"]):
        if len(row) != len(result["columns"]):
            raise ValueError(f"{path.name}: row {number} has {len(row)} cells for {len(result['columns'])} columns.")
    return result


def render(result: dict[str, Any]) -> str:
    """A result as Markdown: title, table, notes, and what to run to get it."""
    lines = [f"**{result['title']}**", "", _line(result["columns"]), _line(["---"] * len(result["columns"]))]
    lines += [_line([_cell(value) for value in row]) for row in result["rows"]]
    notes = [result["notes"]] if isinstance(result["notes"], str) else result["notes"]
    if notes:
        lines += ["", *notes]
    lines += ["", f"`{result['command']}`, commit `{result['commit']}`, seed {_cell(result['seed'])}."]
    return "\n".join(lines) + "\n"


def fill(page: str, results: dict[str, dict[str, Any]], name: str = "page") -> str:
    """A page with each of its blocks filled anew."""

    def replace(match: re.Match) -> str:
        if match["name"] not in results:
            raise ValueError(f"{name} has a block results:{match['name']}, but there is no such file in results/.")
        return match[1] + render(results[match["name"]]) + match[3]

    return BLOCK.sub(replace, page)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is out of step")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    arguments = parser.parse_args()
    results = {path.stem: read_result(path) for path in sorted(arguments.results.glob("*.json"))}
    used, stale = set(), []
    for path in sorted(arguments.docs.rglob("*.md")):
        page = path.read_text()
        filled = fill(page, results, path.name)
        used |= {match["name"] for match in BLOCK.finditer(page)}
        if filled != page:
            stale.append(path)
            if not arguments.check:
                path.write_text(filled)
    for path in stale:
        print(f"{path.name}: {'out of step, run `make results`' if arguments.check else 'written'}")
    for name in sorted(set(results) - used):
        print(f"{name}.json: no page shows it")
    return int(arguments.check and bool(stale))


def _line(cells: list[Any]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _cell(value: Any) -> str:
    """Numbers with four significant digits; whole numbers, text and lists as they are."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(_cell(item) for item in value)
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
