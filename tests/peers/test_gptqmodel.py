"""GPTQModel's directories open here with its logits, and ours open there with ours.

GPTQModel wants another torch than ours, so that it lives in an environment of its own: LILLIPUT_GPTQMODEL_PYTHON names
the interpreter. Each side is one process, which does all directories at once: its import takes long.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lilliput.layers import quantized_layers, replace_linears
from lilliput.models import load_model
from lilliput.models.gptq_files import save_gptq
from tests.conftest import make_tiny_llama, make_tiny_tokenizer

PYTHON = os.environ.get("LILLIPUT_GPTQMODEL_PYTHON", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="LILLIPUT_GPTQMODEL_PYTHON names no interpreter with GPTQModel")

IDS = torch.arange(3, 99).reshape(2, 48)
LARGER = {"hidden_size": 128, "intermediate_size": 288}  # the last group of 64 or 128 has 32
# What GPTQModel is asked to quantize to.
THEIRS: dict[str, dict[str, Any]] = {
    "symmetric": {"bits": 4, "group_size": 32},
    "act-order": {"bits": 4, "group_size": 32, "desc_act": True},
    "asymmetric": {"bits": 4, "group_size": 64, "sym": False},
    "second": {"bits": 4, "group_size": 64, "sym": False, "format": "gptq_v2"},
    "three": {"bits": 3, "group_size": 64},
    "eight": {"bits": 8, "group_size": -1, "act_group_aware": False},
}
# What we write: a format, whether it is symmetric.
OURS: dict[str, tuple[str, bool]] = {
    "symmetric": ("int4-g32", True),
    "asymmetric": ("int4-g64", False),
    "rows": ("int4-row", True),
    "three": ("int3-g64", False),
    "eight": ("int8g", True),
    "two": ("int2-g32", False),
}

PROGRAM = """
import json, sys, torch
from gptqmodel import GPTQModel, QuantizeConfig
from safetensors.torch import save_file

jobs, ids = json.loads(sys.argv[1]), torch.arange(3, 99).reshape(2, 48)

def load(directory, out):
    model = GPTQModel.load(directory, device="cpu", backend="gptq_torch", dtype=torch.float16, trust_remote_code=False)
    with torch.no_grad():
        save_file({"logits": model.model.float()(ids).logits.float().contiguous()}, out)

for job in jobs:
    if "config" in job:
        model = GPTQModel.load(job["dense"], QuantizeConfig(**job["config"]), device="cpu")
        rows = [{"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, 64, dtype=torch.long)}
                for row in job["rows"]]
        model.quantize([{k: v[0].tolist() for k, v in row.items()} for row in rows], batch_size=1)
        model.save(job["directory"])
    load(job["directory"], job["out"])
"""


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


def run(jobs: list[dict[str, Any]]) -> None:
    environment = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2", "DEVICE": "cpu", "TORCHDYNAMO_DISABLE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [PYTHON, "-c", PROGRAM, json.dumps(jobs)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        cwd=Path(jobs[0]["out"]).parent,  # it writes a folder of logs where it stands
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dense")
    make_tiny_llama(**LARGER).save_pretrained(directory)
    make_tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def theirs(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a directory, and logits, of GPTQModel for each row of THEIRS."""
    folder = tmp_path_factory.mktemp("theirs")
    rows = torch.randint(3, 512, (16, 64), generator=torch.Generator().manual_seed(0)).tolist()
    run(
        [
            {
                "dense": str(dense),
                "config": config,
                "rows": rows,
                "directory": str(folder / name),
                "out": str(folder / f"{name}.safetensors"),
            }
            for name, config in THEIRS.items()
        ]
    )
    return folder


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A folder with a directory of ours, and logits of GPTQModel, for each row of OURS; and our logits."""
    folder = tmp_path_factory.mktemp("ours")
    expected = {}
    for name, (number_format, symmetric) in OURS.items():
        model = make_tiny_llama(**LARGER)
        replace_linears(model, number_format, symmetric=symmetric)
        save_gptq(model, folder / name, make_tiny_tokenizer(), progress=False)
        expected[name] = logits(model)
    run([{"directory": str(folder / name), "out": str(folder / f"{name}.safetensors")} for name in OURS])
    return folder, expected


@pytest.mark.parametrize("name", THEIRS)
def test_what_gptqmodel_quantizes_opens_here(name: str, theirs: Path) -> None:
    model = load_model(theirs / name, progress=False)
    assert len(dict(quantized_layers(model))) == 14
    expected = load_file(theirs / f"{name}.safetensors")["logits"]
    torch.testing.assert_close(logits(model), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", OURS)
def test_what_we_write_opens_in_gptqmodel(name: str, ours: tuple[Path, dict[str, Tensor]]) -> None:
    folder, expected = ours
    found = load_file(folder / f"{name}.safetensors")["logits"]
    torch.testing.assert_close(found, expected[name], rtol=2e-3, atol=2e-3)
