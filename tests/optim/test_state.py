"""State is plain tensors that keep their types: saved, loaded, copied and resumed bit for bit, or refused."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lilliput import optim
from lilliput.errors import CheckpointError
from lilliput.optim import BlockwiseOptimizer


def model_of(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 80), nn.Tanh(), nn.Linear(80, 64)).to(dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    dtype = next(model.parameters()).dtype
    for step in steps:
        x = torch.randn(16, 64, generator=torch.Generator().manual_seed(step)).to(dtype)
        optimizer.zero_grad()
        (model(x) - x.roll(1, 1)).float().square().mean().backward()
        optimizer.step()


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(optim.OPTIMIZERS))
@pytest.mark.parametrize("bits", [8, 32])
def test_a_resumed_run_equals_an_uninterrupted_one(name: str, bits: int, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"bits": bits, "lr": 1e-2, "percentile_clipping": 50}
    if name == "sgd":
        options["momentum"] = 0.9
    whole, parts = model_of(dtype), model_of(dtype)
    train(whole, optim.OPTIMIZERS[name](whole.named_parameters(), **options), range(8))
    first = optim.OPTIMIZERS[name](parts.named_parameters(), **options)
    train(parts, first, range(5))
    resumed = model_of(dtype)
    resumed.load_state_dict(parts.state_dict())
    second = optim.OPTIMIZERS[name](resumed.named_parameters(), **{**options, "lr": 1.0})
    second.load_state_dict(through_a_file(first.state_dict()))
    for p, q in zip(parts.parameters(), resumed.parameters(), strict=True):
        kinds = [{k: v.dtype for k, v in o.state[w].items() if k != "step"} for o, w in ((first, p), (second, q))]
        assert kinds[0] == kinds[1]
    train(resumed, second, range(5, 8))
    assert same(resumed, whole)


def test_a_paged_run_is_resumed_in_pages_and_goes_on_from_unpaged_state(tmp_path: Path) -> None:
    whole, parts = model_of(), model_of()
    train(whole, optim.AdamW8bit(whole.parameters()), range(6))
    first = optim.AdamW8bit(parts.parameters())
    train(parts, first, range(2))
    second = optim.PagedAdamW8bit(parts.parameters(), page_folder=tmp_path)
    second.load_state_dict(through_a_file(first.state_dict()))
    train(parts, second, range(2, 4))
    second.load_state_dict(second.state_dict())  # its own pages, old and new
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size >= second.state_bytes()
    third = optim.AdamW8bit(parts.parameters())
    third.load_state_dict(through_a_file(second.state_dict()))
    train(parts, third, range(4, 6))
    assert same(parts, whole)


@pytest.mark.parametrize("paged", [False, True])
def test_copies_and_pickles_go_on_by_themselves(paged: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"paged": True, "page_folder": tmp_path} if paged else {}
    model = model_of()
    optimizer = optim.AdamW8bit(model.parameters(), **options)
    train(model, optimizer, range(2))
    for again in (copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))):
        train(*again, range(2, 4))
        assert again[1].paged is paged
        third = copy.deepcopy(model)
        assert not same(again[0], third)
    train(model, optimizer, range(2, 4))
    assert same(model, again[0])


def test_two_optimizers_never_share_a_state() -> None:
    model, other = model_of(), model_of()
    first, second = optim.AdamW8bit(model.parameters()), optim.AdamW8bit(other.parameters())
    train(model, first, range(1))
    second.load_state_dict(first.state_dict())
    ours = {value.data_ptr() for state in first.state.values() for key, value in state.items() if key != "step"}
    theirs = {value.data_ptr() for state in second.state.values() for key, value in state.items() if key != "step"}
    assert not ours & theirs


def test_hooks_of_others_see_plain_tensors() -> None:
    model, seen = model_of(), []
    optimizer = optim.AdamW8bit(model.parameters())
    train(model, optimizer, range(1))
    optimizer.register_load_state_dict_pre_hook(lambda _, state: seen.append(state["state"][0]["exp_avg"].dtype))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.state[model[0].weight]["exp_avg"].dtype))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [torch.uint8, torch.uint8]


def test_a_state_is_plain_tensors_and_a_count() -> None:
    model = model_of()
    optimizer = optim.AdamW8bit(model.parameters())
    train(model, optimizer, range(1))
    weight, bias = optimizer.state_dict()["state"][0], optimizer.state_dict()["state"][1]
    assert {key: value.dtype for key, value in weight.items() if key != "step"} == {
        "exp_avg": torch.uint8,
        "exp_avg_absmax": torch.float32,
        "exp_avg_sq": torch.uint8,
        "exp_avg_sq_absmax": torch.float32,
    }
    assert weight["exp_avg"].shape == model[0].weight.shape
    assert weight["exp_avg_absmax"].shape == (20,)
    assert set(bias) == {"step", "exp_avg", "exp_avg_sq"}
    assert type(weight["step"]) is int


def saved(**options: Any) -> dict[str, Any]:
    model = model_of()
    optimizer = optim.AdamW8bit(model.named_parameters(), **options)
    train(model, optimizer, range(1))
    return copy.deepcopy(optimizer.state_dict())


def changed(key: str, value: Any) -> dict[str, Any]:
    state = saved()
    state["state"][0][key] = value
    return state


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (lambda: saved(bits=32), r"has 32-bit state for parameter '0.weight' \[80, 64\], which is kept in 8 bits here"),
        (lambda: saved(block=2048), "has blocks of 2048, and here they are of 256. Make the optimizer with block=2048"),
        (lambda: saved(min_8bit_size=10_000), "has 32-bit state for parameter '0.weight'"),
        (lambda: torch.optim.AdamW(model_of().parameters()).state_dict(), "was not saved by AdamW8bit"),
        (lambda: optim.Lion8bit(model_of().parameters()).state_dict(), "has no 'eps': it was not saved by AdamW8bit"),
        (lambda: changed("exp_avg", torch.zeros(80, 64)), "'exp_avg' is torch.float32 .*expected torch.uint8"),
        (
            lambda: changed("exp_avg", torch.zeros(5, 64, dtype=torch.uint8)),
            r"\[5, 64\], expected torch.uint8 \[80, 64\]",
        ),
        (lambda: changed("exp_avg_absmax", None), "'exp_avg_absmax' is None"),
        (lambda: changed("other", torch.zeros(1)), "holds 'other', which is no moment here"),
        (lambda: changed("step", "three"), "step is 'three', expected a count"),
    ],
)
def test_another_state_is_refused_before_anything_changes(state: Any, said: str) -> None:
    model = model_of()
    optimizer = optim.AdamW8bit(model.named_parameters())
    train(model, optimizer, range(1))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(CheckpointError, match=said):
        optimizer.load_state_dict(state())
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert torch.equal(after["state"][0]["exp_avg"], before["state"][0]["exp_avg"])


def test_other_groups_are_refused_as_torch_refuses_them() -> None:
    model = model_of()
    optimizer = optim.AdamW8bit(model.parameters())
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(optim.AdamW8bit([{"params": [p]} for p in model.parameters()]).state_dict())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_state_follows_its_parameters_to_another_device() -> None:
    here, there = model_of(), model_of().cuda()
    first, second = optim.AdamW8bit(here.parameters()), optim.AdamW8bit(there.parameters())
    train(here, first, range(2))
    second.load_state_dict(first.state_dict())
    state: dict[str, Any] = second.state[there[0].weight]
    assert {value.device.type for key, value in state.items() if key != "step"} == {"cuda"}
    back: BlockwiseOptimizer = optim.AdamW8bit(here.parameters())
    back.load_state_dict(second.state_dict())
    for key, value in first.state[here[0].weight].items():
        assert key == "step" or torch.equal(back.state[here[0].weight][key], value)
