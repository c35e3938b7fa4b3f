r"""Is an attention right? The accuracy rule and a gradient check, for any implementation of it.

:func:`assert_attention_close` compares outputs and gradients with standard attention in fp64. How
far they may be off follows from the error that the formula itself makes in the same dtype::

    max|actual - reference| <= factor * max|standard in the same dtype - reference| + floor

with factor 2 for outputs and 3 for gradients; the floor is twice the rounding error of a number as
large as the reference. :func:`gradcheck` needs no reference: it compares derivatives with finite
differences. Tests and benchmarks of this package use the same functions.
"""

from flashlayer.testing.accuracy import (
    FACTORS,
    GRADIENT_FACTOR,
    Comparison,
    assert_accurate,
    assert_attention_close,
    compare,
    run,
)
from flashlayer.testing.bounds import aten_exponential, exponential_error, recomputation_noise
from flashlayer.testing.gradients import gradcheck

__all__ = [
    "FACTORS",
    "GRADIENT_FACTOR",
    "Comparison",
    "assert_accurate",
    "assert_attention_close",
    "aten_exponential",
    "compare",
    "exponential_error",
    "gradcheck",
    "recomputation_noise",
    "run",
]
