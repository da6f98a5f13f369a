"""Masking: a batch of mixed lengths gives what each recording gives alone, and zero-padding without it does not.

The layers below do to time what WeSpeaker's of the same names do, so that the test runs without its package;
test_wespeaker_package.py does the same with the real ones.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from embstore.models.wespeaker.folding import folded
from embstore.models.wespeaker.masking import Mask

LENGTHS = [230, 229, 150, 101, 100, 64, 17]
BINS = 16


class TSTP(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.mean(-1).flatten(1), (x.var(-1) + 1e-7).sqrt().flatten(1)], 1)


class TAP(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(-1).flatten(1)


class TSDP(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x.var(-1) + 1e-7).sqrt().flatten(1)


class ASTP(nn.Module):
    def __init__(self, channels: int, context: bool) -> None:
        super().__init__()
        self.global_context_att = context
        self.linear1 = nn.Conv1d(channels * (3 if context else 1), 8, 1)
        self.linear2 = nn.Conv1d(8, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1, 2) if x.dim() == 4 else x
        context = [x.mean(-1, keepdim=True).expand_as(x), (x.var(-1, keepdim=True) + 1e-7).sqrt().expand_as(x)]
        seen = torch.cat([x, *context], 1) if self.global_context_att else x
        weights = self.linear2(torch.tanh(self.linear1(seen))).softmax(2)
        mean = (weights * x).sum(2)
        return torch.cat([mean, ((weights * x**2).sum(2) - mean**2).clamp(min=1e-7).sqrt()], 1)


class ASP(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(
            nn.Conv1d(channels, 8, 1),
            nn.ReLU(inplace=True),
            nn.BatchNorm1d(8),
            nn.Conv1d(8, channels, 1),
            nn.Softmax(2),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1, 2) if x.dim() == 4 else x
        weights = self.attention(x)
        mean = (x * weights).sum(2)
        return torch.cat([mean, ((x**2 * weights).sum(2) - mean**2).clamp(min=1e-5).sqrt()], 1)


class MHASTP(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        heads = [nn.Sequential(nn.Conv1d(channels // 2, 4, 1), nn.Tanh(), nn.Conv1d(4, 1, 1)) for _ in range(2)]
        self.heads_att_trans = nn.ModuleList(heads)

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.chunk(x.flatten(1, 2) if x.dim() == 4 else x, 2, 1)
        return torch.cat(
            [(head(x).softmax(-1) * x).sum(2) for head, x in zip(self.heads_att_trans, parts, strict=True)], 1
        )


class SimAMBasicBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.SimAM(self.bn(self.conv(x))) + x)

    def SimAM(self, x: Tensor, lambda_p: float = 1e-4) -> Tensor:  # noqa: N802
        square = (x - x.mean(dim=[2, 3], keepdim=True)).pow(2)
        variance = square.sum(dim=[2, 3], keepdim=True) / (x.shape[2] * x.shape[3] - 1)
        return x * torch.sigmoid(square / (4 * (variance + lambda_p)) + 0.5)


class SE_Connect(nn.Module):  # noqa: N801
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(channels, 4), nn.Linear(4, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.linear2(torch.relu(self.linear1(x.mean(2))))).unsqueeze(2)


class CAMLayer(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear_local = nn.Conv1d(channels, channels, 3, padding=2, dilation=2)
        self.linear1, self.linear2 = nn.Conv1d(channels, 4, 1), nn.Conv1d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        segments = functional.avg_pool1d(x, 100, 100, ceil_mode=True).repeat_interleave(100, -1)[..., : x.shape[-1]]
        context = x.mean(-1, keepdim=True) + segments
        return self.linear_local(x) * torch.sigmoid(self.linear2(torch.relu(self.linear1(context))))


class Bins(nn.Module):
    """[rows, frames, bins] to [rows, 1, bins, frames]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).unsqueeze(1)


def two_dimensional(pooling: nn.Module, *middle: nn.Module) -> nn.Sequential:
    """Like a ResNet: strides of 2 over time by kernels of 3 and of 1."""
    return nn.Sequential(
        Bins(),
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        *middle,
        nn.Conv2d(4, 6, 1, stride=2),
        nn.Conv2d(6, 4, (3, 5), stride=(2, 1), padding=(1, 2)),
        pooling,
    )


def one_dimensional(pooling: nn.Module, *middle: nn.Module) -> nn.Sequential:
    """Like ECAPA and the x-vector: dilation, no padding, and padding 'same'."""
    return nn.Sequential(
        Bins(),
        nn.Flatten(1, 2),
        nn.Conv1d(BINS, 8, 5),
        nn.ReLU(),
        nn.BatchNorm1d(8),
        nn.Conv1d(8, 8, 3, dilation=3, padding=3),
        *middle,
        nn.Conv1d(8, 8, 7, padding="same"),
        nn.BatchNorm1d(8),
        pooling,
    )


NETWORKS = {
    "TSTP": two_dimensional(TSTP()),
    "TAP": two_dimensional(TAP()),
    "TSDP": one_dimensional(TSDP()),
    "ASTP": two_dimensional(ASTP(8, context=False)),
    "ASTP with context": one_dimensional(ASTP(8, context=True)),
    "ASP": two_dimensional(ASP(8)),
    "MHASTP": one_dimensional(MHASTP(8)),
    "SimAM": two_dimensional(ASP(8), SimAMBasicBlock(4), SimAMBasicBlock(4)),
    "squeeze and excite": one_dimensional(TSTP(), SE_Connect(8)),
    "context-aware": one_dimensional(TSTP(), CAMLayer(8)),
}


def trained(network: nn.Module) -> nn.Module:
    """A copy with weights and norms that do something: a fresh norm is nearly the identity."""
    torch.manual_seed(0)
    network = copy.deepcopy(network).eval()
    for part in network.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(part.running_mean, 0.3, 0.3)
            nn.init.uniform_(part.running_var, 0.5, 1.5)
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, 0.3, 0.3)
    return network


def features() -> Tensor:
    random = torch.Generator().manual_seed(1)
    rows = [torch.randn(length, BINS, generator=random) * (1 + i) for i, length in enumerate(LENGTHS)]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


@pytest.mark.parametrize("name", NETWORKS)
@torch.inference_mode()
def test_a_mixed_batch_equals_one_by_one(name: str) -> None:
    network, padded = trained(NETWORKS[name]), features()
    alone = torch.cat([network(padded[i : i + 1, :length]) for i, length in enumerate(LENGTHS)])
    leaking = network(padded)
    mask = Mask(network)
    mask.start(torch.tensor(LENGTHS), padded.shape[1])
    scale = alone.abs().max()
    assert (network(padded) - alone).abs().max() < 1e-5 * scale
    assert (leaking - alone).abs().max() > 1e-2 * scale


@torch.inference_mode()
def test_a_batch_of_equal_lengths_after_a_mixed_one() -> None:
    network, padded = trained(NETWORKS["TSTP"]), features()
    plain = network(padded)
    mask = Mask(network)
    mask.start(torch.tensor(LENGTHS), padded.shape[1])
    network(padded)
    mask.start(None, padded.shape[1])
    assert torch.allclose(network(padded), plain, atol=1e-5)


def test_an_unknown_pooling_layer_is_refused() -> None:
    strange = type("Median", (nn.Module,), {"__module__": "wespeaker.models.pooling_layers"})
    with pytest.raises(NotImplementedError, match="Median"):
        Mask(nn.Sequential(nn.Conv1d(1, 1, 1), strange()))


@pytest.mark.parametrize("name", NETWORKS)
@torch.inference_mode()
def test_folding_changes_nothing(name: str) -> None:
    network, padded = trained(NETWORKS[name]), features()
    leaner = folded(network, lambda module: module(padded[:1]))
    assert torch.allclose(leaner(padded), network(padded), rtol=1e-3, atol=1e-4)


@torch.inference_mode()
def test_folding_spares_work_where_a_norm_follows_at_once_and_only_there() -> None:
    network = trained(NETWORKS["ASP"])
    leaner = folded(network, lambda module: module(features()[:1]))
    calls: list[str] = []
    for name, part in leaner.named_modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d) and "forward" not in vars(part):
            part.register_forward_hook(lambda *_, name=name: calls.append(name))
    leaner(features())
    assert calls == ["9.attention.2"]  # behind a ReLU that works in place
