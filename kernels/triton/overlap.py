# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="import-untyped"
"""A kernel that starts while the one before it ends: programmatic dependent launch, from Hopper on.

At small batches a step is hundreds of kernels of a few microseconds, and the start of each costs about one.
A kernel launched with ``launch_pdl`` may start as soon as all programs of the one before it run; its
``wait_for_kernel_before`` returns when that one has ended and what it wrote is visible. Every program must
come to that line before it reads or writes anything that an earlier kernel of the stream touches: then each
kernel's end implies that of all before it. What no kernel writes, weights above all, may be read ahead.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_kernel_before(OVERLAP: tl.constexpr):
    """Without OVERLAP the launch itself has waited."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
