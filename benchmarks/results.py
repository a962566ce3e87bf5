"""
Write the tables of docs/ from the JSON files that runs left in benchmarks/results/: `make results`.

A file `NAME.json` fills the block between `<!-- results:NAME -->` and `<!-- /results:NAME -->` of any page in docs/.
It holds `title`, `command`, `commit`, `seed`, `columns`, `rows` (lists in the order of the columns) and `notes`. With
`beside`, the name of a second file, its columns stand to the right, in the rows of the same first cell. With `--check`
nothing is written, and the exit code says whether a page is out of step.
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


def render(result: dict[str, Any], beside: dict[str, Any] | None = None) -> str:
    """A result as Markdown: title, table, notes, and what to run to get it."""
    sources = [result] if beside is None else [result, beside]
    if beside is not None:
        result = _join(result, beside)
    lines = [f"**{result['title']}**", "", _line(result["columns"]), _line(["---"] * len(result["columns"]))]
    lines += [_line([_cell(value) for value in row]) for row in result["rows"]]
    notes = [result["notes"]] if isinstance(result["notes"], str) else result["notes"]
    if notes:
        lines += ["", *notes]
    lines.append("")
    lines += [f"`{run['command']}`, commit `{run['commit']}`, seed {_cell(run['seed'])}." for run in sources]
    return "\n".join(lines) + "\n"


def fill(page: str, results: dict[str, dict[str, Any]], name: str = "page") -> str:
    """A page with each of its blocks filled anew."""

    def replace(match: re.Match) -> str:
        if match["name"] not in results:
            raise ValueError(f"{name} has a block results:{match['name']}, but there is no such file in results/.")
        result = results[match["name"]]
        return match[1] + render(result, results[result["beside"]] if "beside" in result else None) + match[3]

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
        used |= {results[name]["beside"] for name in used if "beside" in results[name]}
        if filled != page:
            stale.append(path)
            if not arguments.check:
                path.write_text(filled)
    for path in stale:
        print(f"{path.name}: {'out of step, run `make results`' if arguments.check else 'written'}")
    for name in sorted(set(results) - used):
        print(f"{name}.json: no page shows it")
    return int(arguments.check and bool(stale))


def _join(result: dict[str, Any], beside: dict[str, Any]) -> dict[str, Any]:
    """Columns of a second result to the right, matched by the first cell."""
    right = {row[0]: row[1:] for row in beside["rows"]}
    lost = sorted(set(right) - {row[0] for row in result["rows"]})
    if lost:
        raise ValueError(f"{beside['title']!r} has rows {lost}, but {result['title']!r} has none of that name.")
    empty = ["-"] * (len(beside["columns"]) - 1)
    notes = [[part["notes"]] if isinstance(part["notes"], str) else part["notes"] for part in (result, beside)]
    return {
        **result,
        "columns": [*result["columns"], *beside["columns"][1:]],
        "rows": [[*row, *right.get(row[0], empty)] for row in result["rows"]],
        "notes": [*notes[0], *notes[1]],
    }


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
