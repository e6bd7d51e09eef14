"""Check, tune and measure the package on a GPU in two calls of a few minutes: `make gpu OUT=dir`.

    python -m tools.gpu --call 1 --out dir       # at most 170 s
    python -m tools.gpu --call 2 --out dir       # at most 310 s
    python -m tools.gpu --dry-run                # prints the plan; needs no GPU
    python -m tools.gpu --compile --out dir      # compiles call 1's kernels ahead; needs no GPU

The calls need no network, and no packages besides PyTorch and Triton. `alphacl_fast.journal` keeps
the rows, `alphacl_fast.subprocess_pool` runs the child processes, `alphacl_fast.accuracy` compares
the loss with float64, and `alphacl_fast.tune` times tiles. Each of these modules imports only
modules above it:

    schedule    runs phases one after the other, each within its time
    engines     a backend and the way it is told to work (tiles of 64 rows, mma.sync)
    checks      lists the cases in which the loss is compared with float64
    sweeps      compares the two operators alone with float64: layouts, splits, NaN, repeated bits
    timings     measures times, kernels of a step, replays of a CUDA graph
    ahead       compiles the kernels that a task will launch, without a device
    sanitizer   runs small shapes under compute-sanitizer
    warm        computes once what every child needs
    calls       plans the two calls
    summary     writes summary.txt and plots.png
"""

import time

#: About when the process began: this module is imported first, and PyTorch's import counts.
BEGIN = time.monotonic()
