"""Batches of mixed lengths whose padding leaks nowhere: each row comes out as if it were alone.

Zero-padding alone does leak: biases and batch norms make something of the zeros, the next convolution carries it over
the edge, and pooling averages it in (cosine 0.98 at a quarter of padding). So at the input of every convolution those
padded frames are set to zero again that a valid frame of its output sees: as many as the convolution itself adds at the
end, one for a kernel of three. (To set all of the padding to zero takes a GPU as long as the convolutions do.) Whatever
averages over time is replaced by the same over the valid frames. WeSpeaker's code is not touched: hooks and methods are
set on the loaded modules.

How many frames of a row are valid follows from its length by each convolution's own formula; the number of frames in
a tensor tells how far down it is. Modules are known by the names of their classes in wespeaker.models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class Mask:
    """The valid lengths of the batch that is on its way through one module."""

    def __init__(self, module: torch.nn.Module) -> None:
        """Prepare `module` in place. Raises NotImplementedError for a pooling layer that is not known here."""
        import torch

        self._lengths: dict[int, torch.Tensor] = {}  # by frames of the padded tensor, as is the next
        self._shortest: dict[int, int] = {}
        self._padding: dict[int, torch.Tensor] = {}
        self._edges: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        for child in module.modules():
            name = type(child).__name__
            if isinstance(child, torch.nn.Conv1d | torch.nn.Conv2d):
                child.register_forward_pre_hook(self._before_convolution)
            elif name in _OVER_TIME:
                _OVER_TIME[name](self, child)
            elif type(child).__module__.endswith(".pooling_layers"):
                raise NotImplementedError(f"pooling by {name}")

    def start(self, lengths: torch.Tensor | None, width: int, shortest: int = 0) -> None:
        """A batch comes: the frames of each row, int64 [rows], all padded to `width`; None: nothing is padded.

        What lies before `shortest` is known to be no padding, and is left alone.
        """
        self._lengths = {} if lengths is None else {width: lengths}
        self._shortest = {width: shortest}
        self._padding = {}
        self._edges = {}

    def lengths(self, x: torch.Tensor) -> torch.Tensor:
        """Valid frames of each row of x [rows, …, frames]: int64 [rows]."""
        import torch

        frames = x.shape[-1]
        found = self._lengths.get(frames)
        return torch.full((x.shape[0],), frames, device=x.device) if found is None else found

    def zeroed(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, …, frames] with zeros where it is padding, in place."""
        return self.filled(x, 0.0)

    def filled(self, x: torch.Tensor, value: float) -> torch.Tensor:
        """x [rows, …, frames] with `value` where it is padding, in place."""
        import torch

        frames = x.shape[-1]
        if frames not in self._lengths:
            return x
        if frames not in self._padding:
            self._padding[frames] = torch.arange(frames, device=x.device) >= self._lengths[frames][:, None]
        begin = self._shortest[frames]
        padding = self._padding[frames][:, begin:]
        x[..., begin:].masked_fill_(padding.view(x.shape[0], *[1] * (x.dim() - 2), frames - begin), value)
        return x

    def _clear_edge(self, x: torch.Tensor, seen: int) -> None:
        """Set the first `seen` padded frames of each row of x [rows, …, frames] to zero, in place."""
        import torch

        frames = x.shape[-1]
        if (frames, seen) not in self._edges:
            lengths = self._lengths[frames][:, None]
            # A row with fewer padded frames than that has its last frame again: as it is, if there is no padding.
            places = (lengths + torch.arange(seen, device=x.device)).clamp(max=frames - 1)
            rows = torch.arange(x.shape[0], device=x.device)[:, None]
            self._edges[frames, seen] = rows, places, places < lengths
        rows, places, valid = self._edges[frames, seen]
        by_frame = x.movedim(-1, 1)
        kept = by_frame[rows, places]
        by_frame[rows, places] = kept.masked_fill_(~valid.view(*valid.shape, *[1] * (kept.dim() - 2)), 0.0)

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """Mean over the valid frames: float32 [rows, …]."""
        return self.zeroed(x.float()).sum(-1) / self._count(x)

    def variance(self, x: torch.Tensor) -> torch.Tensor:
        """Unbiased variance over the valid frames: float32 [rows, …]."""
        centred = x.float() - self.mean(x)[..., None]
        return self.zeroed(centred.square()).sum(-1) / (self._count(x) - 1)

    def _count(self, x: torch.Tensor) -> torch.Tensor:
        # Never in bfloat16, which has no 1261.
        return self.lengths(x).view(-1, *[1] * (x.dim() - 2)).float()

    def _before_convolution(self, module: Any, args: tuple[torch.Tensor, ...]) -> None:
        (x,) = args
        if not self._lengths or x.shape[-1] not in self._lengths:
            return
        kernel, stride, dilation = module.kernel_size[-1], module.stride[-1], module.dilation[-1]
        reach = dilation * (kernel - 1)
        added = _added(module.padding, reach)
        frames = (x.shape[-1] + added - reach - 1) // stride + 1
        if frames not in self._lengths:
            self._lengths[frames] = (self._lengths[x.shape[-1]] + added - reach - 1) // stride + 1
            self._shortest[frames] = max(0, (self._shortest[x.shape[-1]] + added - reach - 1) // stride + 1)
        # What is added at the end is at most half of it; a frame too many does no harm.
        if added > 0:
            self._clear_edge(x, min((added + 1) // 2, x.shape[-1]))


def _added(padding: str | tuple[int, ...], reach: int) -> int:
    """Frames that a convolution adds, on both sides together."""
    if isinstance(padding, str):
        return reach if padding == "same" else 0
    return 2 * padding[-1]


def _flat(x: torch.Tensor) -> torch.Tensor:
    """[rows, channels, bins, frames] as [rows, channels × bins, frames]; three dimensions stay."""
    return x.flatten(1, 2) if x.dim() == 4 else x


def _mean_pooling(mask: Mask, module: Any) -> None:
    module.forward = lambda x: mask.mean(x).flatten(1)


def _deviation_pooling(mask: Mask, module: Any) -> None:
    module.forward = lambda x: (mask.variance(x) + 1e-7).sqrt().flatten(1)


def _statistics_pooling(mask: Mask, module: Any) -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        import torch

        deviation = (mask.variance(x) + 1e-7).sqrt()
        return torch.cat([mask.mean(x).flatten(1), deviation.flatten(1)], 1)

    module.forward = forward


def _attentive_statistics(mask: Mask, module: Any) -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        import torch

        x = _flat(x)
        seen = x
        if module.global_context_att:
            context = torch.stack([mask.mean(x), (mask.variance(x) + 1e-7).sqrt()])[..., None].expand(-1, *x.shape)
            seen = torch.cat([x, *context], 1)
        scores = module.linear2(torch.tanh(module.linear1(seen)))
        weights = mask.filled(scores.float(), -torch.inf).softmax(2)
        x = x.float()
        mean = (weights * x).sum(2)
        variance = (weights * x.square()).sum(2) - mean.square()
        return torch.cat([mean, variance.clamp(min=1e-7).sqrt()], 1)

    module.forward = forward


def _masked_softmax(mask: Mask, module: Any) -> None:
    """ASP: its attention ends with a softmax over the frames."""
    import torch

    module.attention[-1].register_forward_pre_hook(lambda _, args: (mask.filled(args[0], -torch.inf),))


def _multi_head(mask: Mask, module: Any) -> None:
    """MHASTP: each head's scores go into a softmax over the frames."""
    import torch

    for head in module.heads_att_trans:
        head.register_forward_hook(lambda _, __, scores: mask.filled(scores, -torch.inf))


def _squeeze_excite(mask: Mask, module: Any) -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        import torch

        gate = torch.sigmoid(module.linear2(torch.relu(module.linear1(mask.mean(x)))))
        return x * gate[..., None]

    module.forward = forward


def _simam(mask: Mask, module: Any) -> None:
    def simam(x: torch.Tensor, lambda_p: float = 1e-4) -> torch.Tensor:
        import torch

        # Sums over bins and frames in float32; few passes over x, each of which takes longer than a convolution does.
        x = mask.zeroed(x)
        number = (mask.lengths(x) * x.shape[2]).view(-1, 1, 1, 1)
        total = x.sum((2, 3), keepdim=True, dtype=torch.float32)
        squares = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True, dtype=torch.float32).square()
        mean = total / number
        variance = ((squares - total * mean) / (number - 1)).clamp(min=0)
        scale = (4 * (variance + lambda_p)).rsqrt()
        centred = torch.addcmul((-mean * scale).to(x.dtype), x, scale.to(x.dtype))
        energy = torch.addcmul(centred.new_full((), 0.5), centred, centred, out=centred)
        return energy.sigmoid_().mul_(x)

    module.SimAM = simam


def _context_aware(mask: Mask, module: Any) -> None:
    """CAM++: a gate from the mean over everything and over each 100 frames."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        import torch

        local = module.linear_local(x)
        context = mask.mean(x)[..., None] + _by_segment(mask, x)
        gate = torch.sigmoid(module.linear2(torch.relu(module.linear1(context))))
        gated: torch.Tensor = local * gate
        return gated

    module.forward = forward


def _by_segment(mask: Mask, x: torch.Tensor, size: int = 100) -> torch.Tensor:
    """The mean of the valid frames of each segment of `size` frames, repeated over it: [rows, channels, frames]."""
    import torch

    frames = x.shape[-1]
    starts = torch.arange(0, frames, size, device=x.device)
    counts = (mask.lengths(x)[:, None] - starts).clamp(1, size)
    padded = torch.nn.functional.pad(mask.zeroed(x.float()), (0, -frames % size))
    means = padded.reshape(*padded.shape[:-1], -1, size).sum(-1) / counts[:, None]
    return means.repeat_interleave(size, -1)[..., :frames]


_OVER_TIME: dict[str, Callable[[Mask, Any], None]] = {
    "TAP": _mean_pooling,
    "TSDP": _deviation_pooling,
    "TSTP": _statistics_pooling,
    "ASTP": _attentive_statistics,
    "ASP": _masked_softmax,
    "MHASTP": _multi_head,
    "MQMHASTP": lambda _mask, _module: None,
    "SE_Connect": _squeeze_excite,
    "SimAMBasicBlock": _simam,
    "CAMLayer": _context_aware,
}
