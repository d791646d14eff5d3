"""The house stands: rooms import in one direction only, and importing the package does no work."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "lilliput"
FOUNDATION = {"errors", "files", "memory", "progress"}
# room -> the rooms it may import (besides itself and the foundation)
ARROWS: dict[str, set[str]] = {
    "formats": set(),
    "kernels": {"formats"},
    "layers": {"formats", "kernels"},
    "lora": {"formats", "kernels", "layers"},
    "optim": {"formats", "kernels"},
    "models": {"formats", "kernels", "layers"},
    "data": set(),
    "synthesis": {"data"},
    "training": {"formats", "kernels", "layers", "lora", "optim", "models", "data"},
    "generation": {"formats", "kernels", "layers", "lora", "models", "data"},
    "evaluation": {"formats", "kernels", "layers", "models", "generation", "data"},
    "cli": {
        "formats",
        "kernels",
        "layers",
        "lora",
        "optim",
        "models",
        "data",
        "synthesis",
        "training",
        "generation",
        "evaluation",
    },
}


def imported_rooms(file: Path) -> set[str]:
    rooms: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").startswith("lilliput."):
            rooms.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.module == "lilliput":
            rooms.update(alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            rooms.update(alias.name.split(".")[1] for alias in node.names if alias.name.startswith("lilliput."))
    return rooms


@pytest.mark.parametrize("room", sorted(ARROWS))
def test_arrows_point_one_way(room: str) -> None:
    allowed = ARROWS[room] | FOUNDATION | {room, "_core", "__version__"}
    wrong = {
        f"{file.relative_to(SOURCE)} imports {other}"
        for file in (SOURCE / room).rglob("*.py")
        for other in imported_rooms(file) - allowed
    }
    assert not wrong


def test_every_room_is_known() -> None:
    rooms = {path.name for path in SOURCE.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert rooms == set(ARROWS)


def test_import_changes_no_global_of_torch() -> None:
    program = (
        "import torch; before = (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled());"
        "import lilliput; after = (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled());"
        "assert before == after, (before, after); print('same')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "same", done.stderr
