"""The `backend` fixture: a test that takes it runs on the reference and on the compiled core."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lilliput.kernels import core, use


@pytest.fixture(params=["reference", "core"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the backend that answers during the test."""
    if request.param == "core" and not core.status().loaded:
        pytest.skip(f"the compiled core is not loaded: {core.status().reason}")
    with use(request.param):
        yield request.param
