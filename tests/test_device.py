"""Which device a name means, simulated for GPUs that are not there."""

from __future__ import annotations

import argparse

import pytest
import torch

from gpt2 import GPT2, commands, parallel
from gpt2.device import device_of


@pytest.mark.parametrize(("capability", "usable"), [((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 0), True)])
def test_gpus_that_are_too_old(capability: tuple[int, int], usable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 kernels would not compile for them: the default is then the CPU, and naming such a GPU is an error."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device_of(None, "device") == torch.device("cuda" if usable else "cpu")
    with parallel.world(None) as world:
        assert world.device == torch.device("cuda:1" if usable else "cpu")
    if usable:
        assert device_of("cuda:1", "device") == torch.device("cuda:1")
        return
    message = "device 'cuda:1': kernels need a GPU of compute capability 8.0 or later, got 7.5$"
    with pytest.raises(ValueError, match=f"^from_pretrained: {message}"):
        GPT2.from_pretrained("storybook", device="cuda:1")
    with pytest.raises(ValueError, match=f"^--{message}"):
        commands.load(argparse.Namespace(model="storybook", device="cuda:1", dtype=None))
    with pytest.raises(ValueError, match=f"^--{message}"), parallel.world("cuda:1"):
        pass
