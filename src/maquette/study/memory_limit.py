"""A run that asks for more memory than there is fails; the runs after it find that memory free."""

from __future__ import annotations

import contextlib
import gc
import traceback
from collections.abc import Iterator

from maquette.errors import RunFailed

MEND = (
    "in all arms more `microbatches` (each is smaller), a shorter `workload.length`, or a smaller "
    "`size`; with `--on local:N` fewer processes at once"
)
_SAID_BY_TORCH = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: that of a device, or this machine's."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # Torch has no type of its own for it on a CPU, on Apple's MPS, and inside CUDA's libraries.
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _SAID_BY_TORCH)


@contextlib.contextmanager
def within_memory() -> Iterator[None]:
    """Raises RunFailed, with a mend, when what runs inside is out of memory."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        _free(error)
        raise RunFailed(f"out of memory: {why}", mend=MEND) from error


def _free(error: Exception) -> None:
    """Let go of what the run held, or the next one in this process would find it taken."""
    import torch

    traceback.clear_frames(error.__traceback__)
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
