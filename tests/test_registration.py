"""After `import lilliput` transformers knows our formats, whichever is imported first; and importing stays cheap."""

from __future__ import annotations

import subprocess
import sys

import pytest

import lilliput

KNOWN = "from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as m; print('lilliput' in m)"


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "program",
    [
        "import lilliput; from transformers import AutoModel as A; A.from_config; import transformers.modeling_utils",
        "import transformers.modeling_utils; import lilliput",
        "import lilliput, lilliput.registration as r; r.register_when_needed(); import transformers.modeling_utils",
        "import lilliput; from transformers import LlamaForCausalLM",
    ],
)
def test_transformers_knows_our_formats(program: str) -> None:
    assert run(f"{program}; {KNOWN}") == "True"


def test_importing_lilliput_imports_neither_torch_nor_transformers() -> None:
    heavy = "import sys, lilliput; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    assert run(heavy) == "[]"


def test_every_public_name_is_there() -> None:
    for name in lilliput.__all__:
        assert getattr(lilliput, name) is not None
    assert set(lilliput.__all__) <= set(dir(lilliput))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nf4config'"):
        lilliput.nf4config  # noqa: B018
