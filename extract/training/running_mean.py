"""A running mean of a network's weights, which scatters less than the weights of any one update."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


class RunningMean:
    """The mean over the last updates, older ones weighing less and less; without a `stays`, the weights themselves.

    Args:
        network: whose weights.
        stays: how much of the mean stays at each update; in the first updates less, so that the weights drawn are soon forgotten.
    """

    def __init__(self, network: nn.Module, stays: float) -> None:
        self.stays = stays
        self.tensors: dict[str, Tensor] = {}
        if stays:
            self.tensors = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}

    def take(self, network: nn.Module, step: int) -> None:
        """Add the weights after update `step`, counted from 1."""
        share = 1 - min(self.stays, step / (step + 20))
        if not self.stays:
            return
        with torch.no_grad():
            for name, tensor in network.state_dict().items():
                if tensor.is_floating_point():
                    self.tensors[name].lerp_(tensor, share)
                else:
                    self.tensors[name].copy_(tensor)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from a mean that was kept; KeyError where one of its tensors is missing."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])

    @contextlib.contextmanager
    def in_place(self, network: nn.Module) -> Iterator[None]:
        """Have the network compute with the mean."""
        if not self.stays:
            yield
            return
        own = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
        network.load_state_dict(self.tensors)
        try:
            yield
        finally:
            network.load_state_dict(own)
