"""Sessions of ONNX Runtime, for the models that come as ONNX files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from embstore.errors import ModelError, first_line


def session(file: Path, device: str, *, threads: int, install: str, optimize: bool = True) -> Any:
    """An inference session on `cpu` or `cuda:N`; it may be run by several threads at once.

    `install` says what to type where ONNX Runtime is missing. Raises ModelError.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ModelError(f"{file} needs ONNX Runtime, which is not installed; {install}") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Threads that spin while they wait would take the cores from the decoding threads.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    provider: str | tuple[str, dict[str, str]] = "CPUExecutionProvider"
    if device != "cpu":
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise ModelError(
                f"{file}: the installed onnxruntime has no CUDA; type: pip uninstall onnxruntime;"
                " pip install onnxruntime-gpu (or run on the CPU with --gpus none)"
            )
        provider = ("CUDAExecutionProvider", {"device_id": device.rpartition(":")[2], "use_tf32": "0"})
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=[provider])
    # ONNX Runtime's own exceptions have no common base but this one.
    except Exception as error:
        reason = first_line(error)
        raise ModelError(f"{file} can't be loaded as an ONNX model on {device}: {reason}") from error


def worker_threads() -> int:
    """Threads that this worker process may compute with, as its parent has said (`embstore.extract.devices`)."""
    return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
