"""Draws the house from the code: the README's tree (a line a file, from its docstring) and the arrows in docs/rooms.md.

`python docs/house.py` rewrites both; `tests/test_readme.py` fails when they no longer match the code.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "lilliput"
ROOMS = (
    "formats", "kernels", "layers", "lora", "optim", "models", "data", "synthesis", "training", "generation",
    "evaluation", "cli",
)  # fmt: skip
WIDTH = 110  # characters of a docstring's first sentence that fit behind a file name


def first_sentence(file: Path) -> str:
    """What a file says it is for: the first sentence of its docstring, or of the comment that opens a C++ file."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        said = ast.get_docstring(ast.parse(text)) or ""
    else:
        said = " ".join(re.findall(r"^// ?(.*)", text.split("\n\n")[0], flags=re.MULTILINE))
    sentence = re.split(r"(?<=[.;])\s", " ".join(said.split("\n\n")[0].split()))[0].rstrip(".:;")
    return sentence if len(sentence) <= WIDTH else sentence[: WIDTH - 1].rsplit(" ", 1)[0] + " …"


def room_lines(room: Path) -> list[str]:
    """A room and its files, indented."""
    lines = [f"├─ {room.name + '/':<20} {first_sentence(room / '__init__.py')}"]
    files = sorted(path for path in room.glob("*.py") if path.name != "__init__.py")
    return lines + [f"│  ├─ {path.name:<17} {first_sentence(path)}" for path in files]


def tree() -> str:
    """The README's tree: the foundation, the rooms in the order in which a tensor meets them, the compiled core."""
    lines = ["src/lilliput/"]
    lines += [f"├─ {name:<20} {first_sentence(SOURCE / name)}" for name in sorted(p.name for p in SOURCE.glob("*.py"))]
    for room in ROOMS:
        lines += room_lines(SOURCE / room)
    lines.append("csrc/")
    native = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".cpp", ".h"})
    said = {path: first_sentence(path) for path in native}  # a .cpp beside its header says nothing of its own
    lines += [f"├─ {path.relative_to(ROOT / 'csrc').as_posix():<28} {said[path]}" for path in native if said[path]]
    return "```\n" + "\n".join(line.rstrip() for line in lines) + "\n```"


def imports(room: str) -> list[str]:
    """The other rooms that a room's files import."""
    found: set[str] = set()
    for file in (SOURCE / room).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "lilliput":
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lilliput."):
                found.add(str(node.module).split(".")[1])
    return [other for other in ROOMS if other in found and other != room]


def arrows() -> str:
    """Who imports whom, as a table in the rooms' order: every name on the right stands above its own row."""
    rows = [f"| `{room}` | {', '.join(f'`{other}`' for other in imports(room)) or '—'} |" for room in ROOMS]
    return "| room | imports |\n|---|---|\n" + "\n".join(rows)


def drawn(text: str, name: str, picture: str) -> str:
    """`text` with what stands between the markers of `name` replaced."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    head, rest = text.split(begin, 1)
    return f"{head}{begin}\n{picture}\n{end}{rest.split(end, 1)[1]}"


def pages() -> dict[Path, str]:
    """The pages with drawings, as they should read."""
    readme, rooms = ROOT / "README.md", ROOT / "docs" / "rooms.md"
    return {
        readme: drawn(readme.read_text(encoding="utf-8"), "tree", tree()),
        rooms: drawn(rooms.read_text(encoding="utf-8"), "arrows", arrows()),
    }


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text, encoding="utf-8")
