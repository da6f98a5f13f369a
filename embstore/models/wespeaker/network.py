"""A WeSpeaker network in PyTorch on one device: features of several recordings to their vectors."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from embstore.errors import ModelError
from embstore.models.wespeaker.families import Batching
from embstore.models.wespeaker.folding import folded
from embstore.models.wespeaker.masking import Mask

if TYPE_CHECKING:
    import torch

Precision = Literal["auto", "fp32", "bf16", "fp16"]

_EXAMPLE = (211, 150)
"""Frames of the two made-up recordings that the short cuts have to prove themselves on."""
_SAME = 0.99999
_CLOSE = 0.9999
"""Cosine to the plain module in float32 that masking, and that a lower precision, must reach on them."""


class Network:
    """One module on one device, with the short cuts that leave its vectors as they are."""

    def __init__(
        self, module: torch.nn.Module, bins: int, *, batching: Batching, device: str, precision: Precision
    ) -> None:
        """Take over `module`, in eval mode. `batching` is the most that is tried; `self.batching` is what works.

        Raises ModelError if the device can't be used.
        """
        import torch

        try:
            self._device = torch.device(device)
            self._module = module.to(self._device)
        except (RuntimeError, AssertionError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ModelError(f"model wespeaker: device {device} can't be used: {reason}") from error
        if self._device.type == "cuda":
            # TF32 has 10 bits: float32 on a GPU would differ from float32 on a processor.
            torch.backends.cudnn.allow_tf32 = False
        self._mask: Mask | None = None
        self._dtype: torch.dtype | None = None
        self.batching: Batching = batching
        self._speed_up(bins, precision)

    def encode(self, features: torch.Tensor, lengths: Sequence[int]) -> NDArray[np.float32]:
        """Features [rows, frames, bins] on the device, of which `lengths` are valid: float32 [rows, dim].

        Only with batching `masked` may the lengths differ from the number of frames.
        """
        return self._run(self._module, features, lengths).cpu().numpy()

    def _run(self, module: torch.nn.Module, features: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        import torch

        if self._mask:
            self._mask.start(lengths, features.shape[1], self._device)
        lower = torch.autocast(self._device.type, self._dtype) if self._dtype else contextlib.nullcontext()
        with torch.inference_mode(), lower:
            output = module(features)
        # The last of several is the embedding, as in wespeaker.cli.speaker.
        vectors: torch.Tensor = output[-1] if isinstance(output, tuple) else output
        return vectors.float()

    def _speed_up(self, bins: int, precision: Precision) -> None:
        """Fold, mask and lower the precision, each only if the vectors of an example stay what they are."""
        import torch

        random = torch.Generator().manual_seed(0)
        examples = [torch.randn(1, n, bins, generator=random).to(self._device) for n in _EXAMPLE]
        plain = torch.cat([self._run(self._module, one, [one.shape[1]]) for one in examples])

        def together() -> float:
            """The lowest cosine to what the plain module says, in the way that batches will go."""
            if self.batching == "masked":
                padded = torch.nn.utils.rnn.pad_sequence([one[0] for one in examples], batch_first=True)
                rows = self._run(self._module, padded, _EXAMPLE)
            else:
                rows = torch.cat([self._run(self._module, one, [one.shape[1]]) for one in examples])
            return float(torch.cosine_similarity(rows, plain).min())

        self._module = folded(self._module, lambda module: self._run(module, examples[0], _EXAMPLE[:1]))
        for parameter in self._module.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        if self.batching == "masked":
            try:
                self._mask = Mask(self._module)
            except NotImplementedError:
                self.batching = "equal"
            else:
                # A wespeaker of another version may average over time where this one does not.
                if not together() >= _SAME:
                    self.batching = "equal"
        self._dtype = _lower(precision, self._device)
        if self._dtype and precision == "auto" and not together() >= _CLOSE:
            self._dtype = None


def _lower(precision: Precision, device: torch.device) -> torch.dtype | None:
    """The type to compute in, None for float32. `auto` takes what the device is built for."""
    import torch

    if precision != "auto":
        return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        return torch.bfloat16 if major >= 8 else torch.float16 if major == 7 else None
    return torch.bfloat16 if _has_bf16() else None


def _has_bf16() -> bool:
    """Whether this processor computes in bfloat16; without that PyTorch imitates it, 30 times slower than float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
