"""ResNet34 and SimAM-ResNet34 as WeSpeaker builds them (same layers, same cost), with random weights, in plain torch.

So that `gpu_extract.py` runs where neither wespeaker nor a network is at hand. K. He et al., Deep Residual Learning,
CVPR 2016; X. Qin et al., Simple Attention Module based Speaker Verification, ICASSP 2022. The classes that embstore
masks have the names that they have in wespeaker.models.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TSTP(nn.Module):
    """Mean and deviation over the frames."""

    def forward(self, x: Tensor) -> Tensor:
        """[rows, channels, bins, frames] to [rows, 2 × channels × bins]."""
        return torch.cat([x.mean(-1).flatten(1), (x.var(-1) + 1e-7).sqrt().flatten(1)], 1)


class ASP(nn.Module):
    """Mean and deviation over the frames, weighted by attention."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(
            nn.Conv1d(features, 128, 1), nn.ReLU(), nn.BatchNorm1d(128), nn.Conv1d(128, features, 1), nn.Softmax(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[rows, channels, bins, frames] to [rows, 2 × channels × bins]."""
        x = x.flatten(1, 2)
        weights = self.attention(x)
        mean = (x * weights).sum(2)
        return torch.cat([mean, ((x**2 * weights).sum(2) - mean**2).clamp(min=1e-5).sqrt()], 1)


# By the name of their module embstore knows pooling layers, which compute in float32 in any precision.
TSTP.__module__ = ASP.__module__ = "networks.pooling_layers"


class BasicBlock(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.shortcut = nn.Sequential()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        """[rows, before, bins, frames] to [rows, after, bins / stride, frames / stride]."""
        inner = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(self.SimAM(inner) + self.shortcut(x))

    def SimAM(self, x: Tensor) -> Tensor:  # noqa: N802  as wespeaker calls it
        """Nothing, in a plain block."""
        return x


class SimAMBasicBlock(BasicBlock):
    """A block with attention by each number's distance from its channel's mean."""

    def SimAM(self, x: Tensor) -> Tensor:  # noqa: N802
        """Weigh [rows, channels, bins, frames]."""
        square = (x - x.mean(dim=[2, 3], keepdim=True)).pow(2)
        variance = square.sum(dim=[2, 3], keepdim=True) / (x.shape[2] * x.shape[3] - 1)
        return x * torch.sigmoid(square / (4 * (variance + 1e-4)) + 0.5)


class Network(nn.Module):
    """34 layers, a pooling layer and a linear one."""

    def __init__(self, block: type[BasicBlock], channels: int, pooling: nn.Module, dim: int = 256) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
        blocks, before = [], channels
        for stage, count in enumerate([3, 4, 6, 3]):
            for i in range(count):
                blocks.append(block(before, channels << stage, 2 if stage and not i else 1))
                before = channels << stage
        self.blocks = nn.Sequential(*blocks)
        self.pool = pooling
        self.linear = nn.Linear(2 * before * 10, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[rows, frames, 80] to [rows, dim]."""
        return self.linear(self.pool(self.blocks(self.first(x.transpose(1, 2).unsqueeze(1)))))


def build(name: str) -> Network:
    """`ResNet34` or `SimAM_ResNet34`, in eval mode; the same weights every time."""
    torch.manual_seed(0)
    if name == "ResNet34":
        return Network(BasicBlock, 32, TSTP()).eval()
    return Network(SimAMBasicBlock, 64, ASP(64 * 8 * 10)).eval()
