"""torch's matmul of float8 matrices on CPU, with the same numbers on every processor.

torch's own is oneDNN's: it rounds as the processor's matrix units do, and without AVX-512 or AMX
there is none at all. The last bit matters: what it flips in one matmul is a float8 element in the
next.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

NAME = "_scaled_mm"


def _missing() -> bool:
    a, scale = torch.zeros(16, 16, dtype=torch.float8_e4m3fn), torch.ones(())
    try:
        torch._scaled_mm(a, a.t(), scale_a=scale, scale_b=scale, out_dtype=torch.float32)
    except RuntimeError:
        return True
    return False


NEEDS_SCALED_MM = pytest.mark.skipif(
    _missing(), reason="torch multiplies no float8 on this processor"
)


@contextmanager
def scaled_mm_in_float32() -> Iterator[None]:
    """aten._scaled_mm sums in float32 meanwhile, in this process; graphs still call it by name."""

    def kernel(
        a: torch.Tensor,
        b: torch.Tensor,
        scale_a: torch.Tensor,
        scale_b: torch.Tensor,
        bias: torch.Tensor | None = None,
        scale_result: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        use_fast_accum: bool = False,
    ) -> torch.Tensor:
        assert bias is None and scale_result is None and out_dtype is not None
        return ((a.float() @ b.float()) * (scale_a * scale_b)).to(out_dtype)

    def kernel_out(*args: object, out: torch.Tensor, **options: object) -> torch.Tensor:
        return out.copy_(kernel(*args, **options))  # type: ignore[arg-type]

    library = torch.library.Library("aten", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators")
            library.impl(NAME, kernel, "CPU")
            library.impl(f"{NAME}.out", kernel_out, "CPU")
        yield
    finally:
        library._destroy()
