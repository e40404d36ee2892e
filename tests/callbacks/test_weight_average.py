"""The moving average of the weights: torch's numbers, without its questions to the device."""

import copy
from types import SimpleNamespace

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from waits import Waits

from newllm.callbacks.weight_average import WeightAverage


class Small(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(3, 2)
        self.register_buffer("scale", torch.rand(2))
        self.register_buffer("count", torch.tensor(7))


def test_updates_are_those_of_torch_and_read_nothing_from_the_device() -> None:
    module, callback = Small(), WeightAverage(0.9)
    theirs = AveragedModel(copy.deepcopy(module), avg_fn=get_ema_avg_fn(0.9), use_buffers=True)
    callback.setup(None, module, "fit")
    average = callback._average_model
    found = set()

    for step in range(1, 5):
        with torch.no_grad():
            module.map.weight += torch.randn(2, 3)
        with Waits([*module.parameters(), *average.parameters(), *average.buffers()]) as waits:
            for _ in range(2):  # batches of one step
                callback.on_train_batch_end(SimpleNamespace(global_step=step), module, None, None, 0)
        found |= waits.found
        theirs.update_parameters(module)

    assert not found
    expected = theirs.state_dict() | {"module.count": torch.tensor(7)}  # torch's rounds 0.9 * 7 + 0.1 * 7 down
    torch.testing.assert_close(average.state_dict(), expected)
