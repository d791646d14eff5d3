"""The README and the docs say what is: commands exist, links lead somewhere, the drawn house is the real one."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.main import get_command

import lilliput
from lilliput.cli.main import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def house() -> ModuleType:
    spec = importlib.util.spec_from_file_location("house", ROOT / "docs" / "house.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_drawn_house_is_the_real_one() -> None:
    for page, text in house().pages().items():
        assert page.read_text(encoding="utf-8") == text, f"{page.name} is behind the code: run python docs/house.py"


def commands() -> list[tuple[str, str]]:
    """Every `lilliput …` line in a code block of the README and the docs."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```(?:bash|console|sh)?\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            joined = block.replace("\\\n", " ")
            found += [(page.name, line) for line in re.findall(r"^(?:\$ )?lilliput .*", joined, re.MULTILINE)]
    return found


@pytest.mark.parametrize(("page", "line"), commands())
def test_each_command_of_the_docs_parses(page: str, line: str) -> None:
    """The command exists and knows each option (click's own parser; nothing is run)."""
    words = shlex.split(line.removeprefix("$ "), comments=True)[1:]
    words = [word for word in words if word not in {"…", "..."}]
    command = get_command(app)
    context = command.make_context("lilliput", list(words), resilient_parsing=True)
    while hasattr(command, "get_command"):
        name, sub, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        assert sub is not None, f"{page}: no such command: {line}"
        command = sub
        known = {option for parameter in sub.params for option in (*parameter.opts, *parameter.secondary_opts)}
        if not hasattr(sub, "get_command"):
            used = {word.split("=")[0] for word in rest if word.startswith("-") and not re.match(r"-\d", word)}
            assert used <= known | {"--help"}, f"{page}: {used - known} unknown in: {line}"
        context = sub.make_context(name, list(rest), parent=context, resilient_parsing=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_python_example_runs(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's Python block, on the tiny model, word for word but for the path."""
    block = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[0]
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(block.replace("path/or/hub-id", str(tiny_model_dir)), "README.md", "exec"), names)
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()
    reloaded = AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=lilliput.NF4Config())
    lilliput.load_adapter(reloaded, tmp_path / "my-adapter")
    ids = torch.tensor([[5, 6, 7]])
    trained = names["model"]
    assert isinstance(trained, torch.nn.Module)
    with torch.no_grad():
        assert torch.equal(reloaded.eval()(ids).logits, trained.eval()(ids).logits)
