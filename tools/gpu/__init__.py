"""Check, tune and measure the package on a GPU in two calls of a few minutes: `make gpu OUT=dir`.

    python -m tools.gpu --call 1 --out dir       # at most 170 s
    python -m tools.gpu --call 2 --out dir       # at most 310 s
    python -m tools.gpu --dry-run                # prints the plan; needs no GPU
    python -m tools.gpu --compile --out dir      # compiles call 1's kernels ahead; needs no GPU

Neither needs a network or more than PyTorch and Triton. `calls` says what is done when. The rows
are kept by `alphacl_fast.journal`, the child processes by `alphacl_fast.subprocess_pool`, and the
loss is compared with float64 by `alphacl_fast.accuracy`. Each of the modules knows only the
modules above it:

    schedule    phases one after the other, each within its time; what does not fit is "not run"
    engines     a backend and the way it is told to work (128-row tiles, mma.sync)
    checks      the table of cases in which the loss is compared with float64
    sweeps      the two operators alone against float64: rectangles, splits, NaN, repeated bits
    timings     times, kernels of a step, replays of a CUDA graph
    ahead       compiles the kernels that a task will launch, without a device
    tuning      times tiles and keeps the fastest
    sanitizer   small shapes under compute-sanitizer
    warm        what the server of children computes once
    calls       the two calls
    summary     summary.txt and plots.png
"""

import time

#: When the process began, about: nothing else has been imported, and PyTorch's import counts.
BEGIN = time.monotonic()
