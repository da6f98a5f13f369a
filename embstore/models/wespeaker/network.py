"""A WeSpeaker network in PyTorch on one device: features of several recordings to their vectors."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from embstore.errors import ModelError
from embstore.models.common import unusable
from embstore.models.fbank import integers
from embstore.models.wespeaker import proof
from embstore.models.wespeaker.families import Batching
from embstore.models.wespeaker.folding import folded
from embstore.models.wespeaker.masking import Mask

if TYPE_CHECKING:
    import torch

Precision = Literal["auto", "fp32", "bf16", "fp16"]


class Network:
    """One module on one device, with the short cuts that leave its vectors as they are."""

    def __init__(
        self,
        module: torch.nn.Module,
        bins: int,
        *,
        batching: Batching,
        device: str,
        precision: Precision,
    ) -> None:
        """Take over `module`, in eval mode. `batching` is the most that is tried; `self.batching` is what works.

        Raises ModelError if the device can't be used.
        """
        import torch

        try:
            self._device = torch.device(device)
            self._module = module.to(self._device)
        except (RuntimeError, AssertionError) as error:
            raise ModelError(unusable("wespeaker", device, error)) from error
        if self._device.type == "cuda":
            # TF32 has 10 bits: float32 on a GPU would differ from float32 on a processor.
            torch.backends.cudnn.allow_tf32 = False
        self._mask: Mask | None = None
        self._dtype: torch.dtype | None = None
        self.batching: Batching = batching
        self._speed_up(bins, precision)

    def encode(self, features: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Features [rows, frames, bins] on the device, of which `lengths` are valid: float32 [rows, dim] there.

        Only with batching `masked` may the lengths differ from the number of frames. A GPU may still be computing them.
        """
        return self._run(self._module, features, lengths)

    def _run(self, module: torch.nn.Module, features: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        import torch

        if self._mask:
            padded = min(lengths) < features.shape[1]
            known = integers(lengths, self._device) if padded else None
            self._mask.start(known, features.shape[1], min(lengths))
        lower = torch.autocast(self._device.type, self._dtype) if self._dtype else contextlib.nullcontext()
        with torch.inference_mode(), lower:
            output = module(features)
        # The last of several is the embedding, as in wespeaker.cli.speaker.
        vectors: torch.Tensor = output[-1] if isinstance(output, tuple) else output
        return vectors.float()

    def _speed_up(self, bins: int, precision: Precision) -> None:
        """Fold, mask and lower the precision, each only if the vectors of an example stay what they are."""
        import torch

        examples = proof.examples(bins, self._device)
        plain = [self._run(self._module, one, [one.shape[1]]) for one in examples]

        def together() -> float:
            """The lowest cosine to what the plain module says, in the way that batches will go."""
            if self.batching != "masked":
                rows = [self._run(self._module, one, [one.shape[1]]) for one in examples]
            else:
                padded = torch.nn.utils.rnn.pad_sequence([one[0] for one in examples], batch_first=True)
                rows = [self._run(self._module, padded, proof.LENGTHS)]
            return proof.lowest_cosine(rows, plain)

        self._module = folded(self._module, lambda module: self._run(module, examples[0], proof.LENGTHS[:1]))
        lower = _lower(precision, self._device)
        # In float32 a GPU takes 1.7 times as long that way for ResNet34, 3 times for SimAM-ResNet34.
        if lower or self._device.type != "cuda":
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
                if not together() >= proof.SAME:
                    self.batching = "equal"
        self._dtype = lower
        if lower:
            _pool_exactly(self._module, self._device.type)
            if precision == "auto" and not together() >= proof.CLOSE:
                self._dtype = None


def _pool_exactly(module: torch.nn.Module, device_type: str) -> None:
    """Have pooling layers compute in float32 within a lower precision: they take differences of large numbers."""
    import torch

    def exactly(pool: Any) -> Any:
        def forward(x: torch.Tensor) -> torch.Tensor:
            with torch.autocast(device_type, enabled=False):
                pooled: torch.Tensor = pool(x.float())
            return pooled

        return forward

    for child in module.modules():
        if type(child).__module__.endswith(".pooling_layers"):
            child.forward = exactly(child.forward)


def _lower(precision: Precision, device: torch.device) -> torch.dtype | None:
    """The type to compute in, None for float32. `auto` takes what the device is built for."""
    import torch

    if precision != "auto":
        return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        return torch.bfloat16 if major >= 8 else torch.float16 if major == 7 else None
    return torch.bfloat16 if has_bf16() else None


def has_bf16() -> bool:
    """Whether this processor computes in bfloat16; without that PyTorch imitates it, 30 times slower than float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
