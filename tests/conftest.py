import contextlib
import dataclasses
import inspect
import os
import shlex
import shutil
import signal
import threading
import time

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: kernels run on the CPU
# before torch is: threads outnumber cores, so they had better not spin
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# torch's inductor compiles in this process: a pool of its own would import torch in each worker
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# a compiler's call for every function that a test makes up; test_cpu_functions.py compiles some
os.environ.setdefault("ALPHACL_CPU_COMPILE", "0")

import pytest
import torch

from tools import build_cuda


def _emulated_cuda_kernels():
    """csrc/cuda compiled for the host; "" without a compiler."""
    return (
        str(build_cuda.emulated())
        if shutil.which(shlex.split(os.environ.get("CXX", "c++"))[0])
        else ""
    )


if "ALPHACL_CUDA_EMULATED" not in os.environ:
    os.environ["ALPHACL_CUDA_EMULATED"] = _emulated_cuda_kernels()

# as in a shell's background job; tests send it
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

#: Seconds after which a process that a test waits for hangs, on a machine however busy.
WATCHDOG = 900


@contextlib.contextmanager
def watchdog(process):
    """Kill a process that hangs, so that a test which waits for it needs no clock of its own."""
    timer = threading.Timer(WATCHDOG, process.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def wait_until(process, holds):
    """Waits until ``holds()`` while a subprocess runs; its end before that is a failure."""
    with watchdog(process):
        while not holds():
            assert process.poll() is None, process.stderr.read() if process.stderr else "it ended"
            time.sleep(0.005)


# Small tensors run fastest on one thread, and a barrier per operation would make a busy machine's
# run take hours.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def ranks():
    """Processes for every test that asks for some; the group "ranks" keeps those tests in one
    worker.
    """
    from ranks import Ranks

    with Ranks() as started:
        yield started


@pytest.fixture
def one_thread():
    """What a test does to the number of threads ends with it."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def quick_plots():
    """A training run writes its pictures without drawing them, whatever patches a test undoes."""
    from alphacl_fast.train import loop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "picture", lambda encoder, data, path: path.write_bytes(b"a picture"))
        patch.setattr(loop.report, "curves", lambda metrics, path, title: path.write_bytes(b"one"))
        yield


@pytest.fixture
def fresh_dynamo():
    """What torch.compile has kept of other tests does not count, and nothing is left to them."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def poisoned():
    """Uninitialised memory is NaN, so an output element that nobody wrote fails the test."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def set_tiles(monkeypatch, rows):
    """Tiles of so many rows in every backend (of the interpreter, which is slow, two by two
    tiles, the last ones ragged).
    """
    from alphacl_fast.backend import blocked, cpu, triton

    monkeypatch.setattr(blocked, "tile_size", lambda n, device: min(n, rows))
    monkeypatch.setattr(cpu, "block_rows", lambda n, sizes: min(n, rows))
    monkeypatch.setattr(
        triton,
        "tile",
        lambda sweep, mode, dim, n, device: square_tile(max(8, power_of_two(n) // 2), dim),
    )


def power_of_two(x):
    return 1 << (x - 1).bit_length()


def square_tile(rows, dim):
    from alphacl_fast.kernels.config import Tile

    return Tile(rows, rows, power_of_two(dim), warps=4, stages=1)


@pytest.fixture(autouse=True)
def _own_plans():
    """A test replaces what chooses kernels, so that no plan outlives it."""
    from alphacl_fast import functional, launches

    launches.forget()
    functional._CALLS.clear()


@pytest.fixture(autouse=True)
def _large_interpreted_tiles(monkeypatch):
    """The interpreter's time goes by the number of tiles."""
    from alphacl_fast.backend import triton

    monkeypatch.setattr(
        triton,
        "tile",
        lambda sweep, mode, dim, n, device: square_tile(min(512, power_of_two(n)), dim),
    )


@pytest.fixture
def steps(monkeypatch):
    """The plans of the native steps that a test has executed."""
    from alphacl_fast.backend import cpu_step

    executed, execute = [], cpu_step.Plan._execute
    monkeypatch.setattr(
        cpu_step.Plan, "_execute", lambda plan, *args: executed.append(plan) or execute(plan, *args)
    )
    return executed


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 5 rows, so that small batches have full, partial and diagonal tiles."""
    set_tiles(monkeypatch, 5)


@pytest.fixture
def medium_tiles(monkeypatch):
    """Tiles of 16 rows: a few tiles, for tests that measure rounding (one tile of the
    interpreter's).
    """
    from alphacl_fast.backend import triton

    set_tiles(monkeypatch, 16)
    monkeypatch.setattr(
        triton, "tile", lambda sweep, mode, dim, n, device: square_tile(power_of_two(n), dim)
    )


def _patch_once_a_launch():
    """Triton's interpreter patches its language again for each device function called.

    Once a launch will do.
    """
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    patched, modules_of = set(), {}
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__

    def patch_missing(fn):
        modules = modules_of.get(id(fn.__globals__))
        if modules is None:
            found = (
                x for x in fn.__globals__.values() if inspect.ismodule(x) and x in (tl, tl.core)
            )
            modules = modules_of[id(fn.__globals__)] = {id(x) for x in found}
        if not modules <= patched:
            patched.update(modules)
            return patch(fn)

    def launch_unpatched(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_missing, launch_unpatched


def _look_dtypes_up_once():
    """Triton's interpreter makes its table of NumPy's dtypes anew for each operation."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    look_up, known = interpreter._get_np_dtype, {}

    def looked_up(dtype):
        name = dtype.scalar.name
        if name not in known:
            known[name] = look_up(dtype.scalar)
        return known[name]

    interpreter._get_np_dtype = looked_up


def _multiply_as_a_gpu_does():
    """A float32 product's elements all round alike, whichever place they have in a tile: t_ij =
    t_ji to the last bit.

    NumPy's library adds up differently at the edges of a matrix, and where |t|/τ is large one
    rounding of t is much. einsum does not call it: it adds up k after k for every element.
    """
    try:
        import numpy
        from triton.runtime import interpreter
    except ImportError:
        return
    original = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, *options):
        if a.data.dtype != "float32" or d.data.dtype != "float32":
            return original(self, a, b, d, *options)
        # the layout in memory decides which loop is the inner one, so it is always the same
        columns, rows = map(numpy.ascontiguousarray, (a.data, b.data))
        total = d.data + numpy.einsum("ik,kj->ij", columns, rows, optimize=False)
        return interpreter.TensorHandle(total, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


def _describe_shapes_once():
    """Triton's interpreter describes the shape of every tensor anew, and looks for overflows that
    it reports in debug mode only.
    """
    try:
        from triton.language import core
        from triton.runtime import interpreter
    except ImportError:
        return
    builder = interpreter.interpreter_builder
    describe_type, describe_tensor = core.block_type.__init__, core.tensor.__init__
    types, shapes = {}, {}

    def type_once(self, element_ty, shape):
        if type(element_ty) is not core.dtype:  # of pointers
            return describe_type(self, element_ty, shape)
        key = element_ty.name, *(x.value if isinstance(x, core.constexpr) else x for x in shape)
        if key not in types:
            describe_type(self, element_ty, shape)
            types[key] = {**vars(self)}
        vars(self).update(types[key])

    def tensor_once(self, handle, kind):
        if kind.is_block() and kind.name in shapes:
            self.handle, self.type, self.dtype = handle, kind, kind.scalar
            self.numel, self.shape = shapes[kind.name]
            return
        describe_tensor(self, handle, kind)
        # in another version of Triton a tensor may have more to it
        if kind.is_block() and {*vars(self)} == {"handle", "type", "dtype", "numel", "shape"}:
            shapes[kind.name] = self.numel, self.shape

    core.block_type.__init__, core.tensor.__init__ = type_once, tensor_once
    if getattr(builder.options, "sanitize_overflow", False) and not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


_patch_once_a_launch()
_look_dtypes_up_once()
_describe_shapes_once()
_multiply_as_a_gpu_does()
