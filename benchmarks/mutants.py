"""
Break each formula on purpose and see whether a test notices: `make mutants-functional`.

Every arithmetic operator, comparison, minimum or maximum, minus sign and boolean in `rlhf_ext/functional` is changed
once, in a copy of the sources, and the tests of `functional/` run against the copy. A mutant that survives is printed
with its place: either a test is missing, or the change means nothing.
"""

import argparse
import ast
import copy
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
NAMES = {"maximum": "minimum", "minimum": "maximum", "max": "min", "min": "max", "exp": "expm1", "expm1": "exp"}


def mutate(node: ast.AST) -> ast.AST | None:
    """The node with one change, or None where there is nothing to change."""
    changed = copy.deepcopy(node)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        changed.op = OPERATORS[type(node.op)]()
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS:
        changed.ops[0] = OPERATORS[type(node.ops[0])]()
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Invert | ast.Not):
        changed = copy.deepcopy(node.operand)
    elif isinstance(node, ast.Attribute) and node.attr in NAMES:
        changed.attr = NAMES[node.attr]
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        changed.value = not node.value
    else:
        return None
    return changed


def mutants_of(path: Path) -> Iterator[tuple[str, str]]:
    """(what was changed, the whole source after it) for each place in a file."""
    source = path.read_text()
    tree = ast.parse(source)
    types = [getattr(node, field, None) for node in ast.walk(tree) for field in ("annotation", "returns")]
    skipped = {id(inner) for type_ in types if type_ is not None for inner in ast.walk(type_)}
    lines = source.splitlines(keepends=True)
    starts = [sum(len(line.encode()) for line in lines[:number]) for number in range(len(lines))]
    for node in ast.walk(tree):
        changed = None if id(node) in skipped else mutate(node)
        if changed is None:
            continue
        start, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
        text = source.encode()
        new = text[:start] + f"({ast.unparse(changed)})".encode() + text[end:]
        yield f"{path.name}:{node.lineno}: {ast.unparse(node)}  ->  {ast.unparse(changed)}", new.decode()


def survives(path: Path, source: str) -> bool:
    """Whether the tests of `functional/` pass with `source` in the place of `path`."""
    with tempfile.TemporaryDirectory() as folder:
        copied = Path(folder)
        for name in ("rlhf_ext", "tests"):
            shutil.copytree(ROOT / name, copied / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copied)
        (copied / path.relative_to(ROOT)).write_text(source)
        line = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", "tests/functional"]
        environment = {**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, timeout=300)
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", help="only this file of functional/, such as `losses.py`")
    parser.add_argument("--sample", type=int, help="only so many mutants, drawn with seed 0")
    parser.add_argument("--jobs", type=int, default=2, help="mutants tried at once")
    arguments = parser.parse_args()
    files = sorted((ROOT / "rlhf_ext" / "functional").glob(arguments.file or "[!_]*.py"))
    mutants = [(path, place, source) for path in files for place, source in mutants_of(path)]
    if arguments.sample is not None and arguments.sample < len(mutants):
        mutants = random.Random(0).sample(mutants, arguments.sample)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        alive = list(pool.map(lambda mutant: survives(mutant[0], mutant[2]), mutants))
    survivors = [place for (_, place, _), lives in zip(mutants, alive, strict=True) if lives]
    print(f"{len(mutants) - len(survivors)} of {len(mutants)} mutants were noticed.")
    for place in survivors:
        print(f"survived  {place}")
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main())
