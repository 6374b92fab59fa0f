"""Which device serves."""

from __future__ import annotations

import os

import pytest
import torch

from turret.server.build import _choose_device
from turret.server.config import ModelConfig
from turret.server.errors import InvalidRequestError


def choose(monkeypatch: pytest.MonkeyPatch, wanted: str, visible: str | None, there: bool = True):
    """The device, and what this process sees of the machine's."""
    # Set first, so that what the server sets is undone too.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    seen: list[str | None] = []

    def is_available() -> bool:
        seen.append(os.environ.get("CUDA_VISIBLE_DEVICES"))
        return there

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    return _choose_device(ModelConfig(device=wanted)), seen


@pytest.mark.parametrize(
    ("wanted", "visible", "left"),
    [
        ("cuda", None, None),
        ("auto", "4,5", "4,5"),
        ("cuda:0", None, "0"),
        ("cuda:3", None, "3"),
        ("cuda:1", "4, 5", "5"),
        ("cuda:1", "GPU-aa,GPU-bb", "GPU-bb"),
    ],
)
def test_one_device_is_seen_and_it_is_number_0(
    monkeypatch: pytest.MonkeyPatch, wanted: str, visible: str | None, left: str | None
):
    device, seen = choose(monkeypatch, wanted, visible)
    assert device == torch.device("cuda", 0)
    assert set(seen) == {left}, "before torch looks for the first time"


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(InvalidRequestError, match="CUDA_VISIBLE_DEVICES is '4,5'"):
        choose(monkeypatch, "cuda:2", "4,5")
    with pytest.raises(InvalidRequestError, match="cuda:7 was asked for"):
        choose(monkeypatch, "cuda:7", None, there=False)
    assert choose(monkeypatch, "auto", None, there=False)[0] == torch.device("cpu")
    assert choose(monkeypatch, "cpu", None)[0] == torch.device("cpu")
