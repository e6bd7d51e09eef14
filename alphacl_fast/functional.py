"""`alpha_cl_loss`: the loss as a function, and the checks of every argument."""

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from . import compiled_op, distributed, eager, native, ops, process_groups, steps
from .autograd import AlphaCLFunction, closed_form
from .backend import reference
from .bundles import accumulation_dtype
from .call import (
    LARGEST_LOGIT,
    LARGEST_TAU,
    LEAST_TAU,
    MOST_READY,
    BoundCall,
    Call,
    Guide,
    Layout,
    Need,
    SameId,
    as_operator,
    without_autocast,
)
from .objectives import DEFAULTS, ClosedForm, Objective, is_built_in, make
from .tracing import breaks_the_graph

SIMILARITIES = ("cosine", "dot", "euclidean")
NEGATIVES = ("two_view", "one_view", "cross_view")
REDUCTIONS = ("mean", "sum", "none")
#: The values that each setting may have.
VALID = {
    "similarity": SIMILARITIES,
    "negatives": NEGATIVES,
    "reduction": REDUCTIONS,
    "precision": (None, "ieee", "tf32", "bf16x3"),
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
#: `guided.loss`, which is an operator of compiled graphs, and that is made of this module.
GUIDED: list[Callable[..., Tensor]] = []
#: The guide of a call with these embeddings, and its margin; it raises unless it fits them.
Opinion = Callable[[Tensor, Call], tuple[Guide, float]]
#: Calls by their settings: what they keep serves the next one.
_CALLS: dict[tuple[Any, ...], Call] = {}
#: τ, or what SigLIP has in its place: (scale, bias).
Temperature = float | Tensor | tuple[float | Tensor, float | Tensor]


def alpha_cl_loss(
    z1: Tensor,
    z2: Tensor,
    objective: str | Objective = "infonce",
    *,
    temperature: float | Tensor = 0.5,
    similarity: str = "cosine",
    negatives: str = "two_view",
    symmetric: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
    precision: str | None = None,
    process_group: Any = None,
    strategy: str = "auto",
    ranks_per_node: int | None = None,
    ids: Tensor | None = None,
    max_gap: float | None = None,
    guide: tuple[Tensor, Tensor] | None = None,
    guide_margin: float = 0.0,
    workspace: int | None = None,
    **options: Any,
) -> Tensor:
    """Contrastive loss of a batch of positive pairs.

    Gradients flow to z1, z2 and a tensor temperature.

    Args:
        z1: (N, D) embeddings of the first view, N ≥ 1, in float32, float64, bfloat16 or float16.
            Any strides are accepted. One pair has no negatives: its loss is 0, and so is its
            gradient.
        z2: (N, D) embeddings of the second view, on the device of z1; rows i of both are a positive
            pair. Towers of two dtypes are promoted to one, as torch promotes them, and each
            gradient has the dtype of its input.
        objective: a name listed by `alphacl_fast.objectives.names`, or an `Objective`.
        temperature: τ > 0, a float or a tensor with one element, differentiable where the objective
            allows it. The host never reads a tensor on an accelerator, so its value is not checked.
        similarity: "cosine" (rows are normalised here; an all-zero row has gradient 0), "dot" (rows
            as given) or "euclidean" (t = −½‖z_i − z_j‖²).
        negatives: "two_view" (2N anchors against all other rows but the positive), "one_view"
            (anchors and negatives are the rows of z1) or "cross_view" (anchors z1 against z2).
        symmetric: with "cross_view", whether the rows of z2 are anchors too; both directions are
            averaged. Ignored unless negatives="cross_view".
        reduction: "mean" or "sum" over the anchors, or "none": (2N,) for two_view, else (N,).
        backend: "auto", "cpu" (compiled C++), "triton" (GPUs), "cuda" (compiled CUDA C++, NVIDIA
            GPUs), "blocked" (PyTorch operations, any device) or "reference" (dense: the oracle).
        precision: arithmetic of float32 matrix products. None follows
            `torch.get_float32_matmul_precision`; "ieee", "tf32" or "bf16x3" (three products of
            bfloat16 halves) selects one, and a backend that lacks it raises an error.
        process_group: a `torch.distributed.ProcessGroup`, a 1-dimensional DeviceMesh or "world",
            whose ranks share one batch. Each rank passes its own pairs (any number) and receives
            the loss of the whole batch or, with reduction="none", the losses of its own anchors.
            All ranks must make the same call, with tensors on devices of one type. Each rank
            differentiates Σ_r L_r, so DDP's or FSDP's averaging gives the gradient of the whole
            batch; the temperature's gradient is that average on every rank. Unless
            reduction="none", the incoming gradient must be the same on all ranks. The first
            call makes a separate group for the messages. None: the batch is on this process.
        strategy: how ranks exchange rows: "gather" (all-gather and reduce-scatter; few messages),
            "ring" (messages overlap with computation; memory for a few local blocks), "two_level"
            (gather within a node, ring between nodes; memory for the blocks of a node) or "auto"
            (gather while the whole batch takes at most 256 MiB, else the one of the other two that
            `alphacl_fast.plan` predicts to be faster). Only with a process group.
        ranks_per_node: how many neighbouring ranks of the group share a node; it must divide the
            number of ranks. Only with the strategies "two_level" and "auto". None: the environment
            variable LOCAL_WORLD_SIZE, which torchrun sets.
        ids: (N,) integers, moved to z1's device if necessary. Samples with equal ids are not
            negatives of each other in either view (false-negative elimination, arXiv:2011.11765).
            Pass labels, or the index of the instance that was augmented. An anchor that has no
            negatives left has loss 0 and no gradient, and "mean" still counts it. With a process
            group every rank passes the ids of its own pairs, which are compared over all ranks.
            None: only the anchor and its positive are excluded.
        max_gap: a negative whose similarity exceeds the positive's by more than this, Δ_ij =
            t_ij − t⁺_i > max_gap, is not a negative of anchor i: it may be a false one
            (Qwen3-Embedding, arXiv:2506.05176, has 0.1). Each anchor has its own Δ, in both
            directions of "cross_view". Two cosines that differ by less than eight units of rounding
            count as equal. Which negatives count is a constant of the gradient. An anchor that has
            none left has loss 0. It may be negative. All ranks of a process group must pass the
            same. None: all negatives count.
        guide: (g1, g2), another model's embeddings (N, G) of both views, in any float dtype.
            A negative is left out if its cosine similarity with the anchor, in the guide's
            embeddings, is larger than the similarity of the positive pair there minus
            ``guide_margin`` (GISTEmbed, arXiv:2402.16829). Two similarities that differ by less
            than eight units of rounding count as equal. The guide gets no gradient. With a process
            group every rank passes the guide's embeddings of its own pairs. The backends "cpu",
            "blocked" and "reference" serve it. None: there is no guide.
        guide_margin: any finite number; a positive one leaves out more.
        workspace: bytes in which the CPU kernels may keep tiles of pairs from one sweep to the
            next instead of computing them again; the memory is one per process and stays
            allocated. 0 keeps nothing; the result has the same bits in any case. None: the
            environment variable ALPHACL_CPU_WORKSPACE, or else 64 MiB. Other backends ignore it.
        **options: options of the objective, by its own names.

    Returns:
        () or, with reduction="none", one loss per anchor; float32, or float64 for float64 input.

    Raises:
        TypeError: an argument has a wrong type or dtype; the message names the argument, what was
            expected and what was received.
        ValueError: an argument has a bad value or shape, or no backend can serve the call. With a
            process group every rank raises, and the message names the ranks at fault.

    Source: arXiv:2201.12680; the docstring of each objective names its equation and origin.
    """
    known = key = None
    if not torch.compiler.is_dynamo_compiling() and (
        guide is process_group is ranks_per_node is None and strategy == "auto"
    ):
        # True is not 1
        known = (
            objective, similarity, negatives, reduction, backend, precision, symmetric, max_gap,
            workspace, type(symmetric), type(max_gap), type(workspace),
        )  # fmt: skip
        if options:
            known += (*options.items(), *map(type, options.values()))
        try:
            call = _CALLS.get(known)
        except TypeError:  # the checks say which value it is that cannot be hashed
            call = known = None
        if call is not None:
            if type(guide_margin) is not float or guide_margin != 0.0:
                check_guide_margin(guide_margin)
            found, key = steps.again(z1, z2, temperature, call, ids)
            return (found or evaluate(z1, z2, temperature, call, ids, key))[0]
    settings = {
        "similarity": similarity,
        "negatives": negatives,
        "symmetric": symmetric,
        "reduction": reduction,
        "backend": backend,
        "precision": precision,
        "max_gap": max_gap,
        "workspace": workspace,
    }
    group = make_group(process_group, strategy, ranks_per_node)
    try:
        call = make_call(objective, options, process_group=group, **settings)
        check_guide_margin(guide_margin)
    except (TypeError, ValueError) as error:
        if group is not None:
            distributed.agree(group, None, None, None, None, error)  # raises
        raise
    if known is not None and is_built_in(call.objective):
        if len(_CALLS) >= MOST_READY:
            _CALLS.clear()
        _CALLS[known] = call
        _, key = steps.again(z1, z2, temperature, call, ids)
    if guide is not None:
        (guided_loss,) = GUIDED
        return guided_loss(z1, z2, temperature, call, ids, guide, guide_margin)
    return evaluate(z1, z2, temperature, call, ids, key)[0]


def like_before(known: tuple[Any, ...], make: Callable[[], Call]) -> Call:
    """The settings that ``make()`` returns; it is called once for equal ``known``.

    Calls with equal settings share one object, and with it the plans that the object holds.
    Settings of users' objectives are made each time.
    """
    known = *known, *map(type, known)  # True is not 1
    try:
        call = _CALLS.get(known)
    except TypeError:  # the checks say which value it is that cannot be hashed
        return make()
    if call is None:
        call = make()
        if is_built_in(call.objective):
            if len(_CALLS) >= MOST_READY:
                _CALLS.clear()
            _CALLS[known] = call
    return call


def make_group(
    process_group: Any, strategy: str, ranks_per_node: int | None = None
) -> process_groups.ProcessGroup | None:
    """Checks the arguments that say which processes share a batch, and how."""
    one_of("strategy", strategy, process_groups.STRATEGIES)
    if process_group is None:
        for name, value, default in (
            ("strategy", strategy, "auto"),
            ("ranks_per_node", ranks_per_node, None),
        ):
            if value != default:
                raise ValueError(
                    f"{name} must be {default!r} without a process_group, got {value!r}"
                )
        return None
    return process_groups.ProcessGroup(process_group, strategy, ranks_per_node)


def make_call(
    objective: str | Objective,
    options: dict[str, Any],
    *,
    process_group: process_groups.ProcessGroup | None = None,
    symmetric: bool = True,
    max_gap: float | None = None,
    workspace: int | None = None,
    **settings: Any,
) -> Call:
    """Checks every argument but the tensors; ``settings``: the other fields of `Call`."""
    for name, value in settings.items():
        one_of(name, value, ops.BACKEND_NAMES if name == "backend" else VALID[name])
    if not isinstance(symmetric, bool):
        raise TypeError(f"symmetric must be True or False, got {symmetric!r}")
    check_workspace(workspace)
    check_max_gap(max_gap)
    if process_group is not None and settings["backend"] == "reference":
        raise ValueError(
            "backend must not be 'reference' with a process_group: the oracle runs in one process"
        )
    if not options and isinstance(objective, str):
        # A compiled graph may use existing objects, but not make any.
        objective = DEFAULTS.get(objective, objective)
    made = make(objective, options)
    if max_gap is not None and isinstance(made, ClosedForm):
        made = made.of_each_pair
    return Call(
        made,
        symmetric=symmetric,
        process_group=process_group,
        max_gap=None if max_gap is None else float(max_gap),
        workspace=workspace,
        **settings,
    )


def check_max_gap(max_gap: float | None) -> None:
    """Raises unless it is None or a number other than NaN."""
    if max_gap is None:
        return
    if isinstance(max_gap, bool) or not isinstance(max_gap, Real):
        raise TypeError(f"max_gap must be None or a number, got {max_gap!r}")
    if max_gap != max_gap:
        raise ValueError(f"max_gap must be None or a number, got {max_gap}")


def check_workspace(workspace: int | None) -> None:
    """Raises unless it is None or a number of bytes."""
    if workspace is None:
        return
    if isinstance(workspace, bool) or not isinstance(workspace, int):
        raise TypeError(f"workspace must be None or a number of bytes, got {workspace!r}")
    if workspace < 0:
        raise ValueError(f"workspace must be ≥ 0, got {workspace}")


def check_guide_margin(guide_margin: float) -> None:
    """Raises unless it is a finite number."""
    if isinstance(guide_margin, bool) or not isinstance(guide_margin, Real):
        raise TypeError(f"guide_margin must be a number, got {guide_margin!r}")
    if not abs(guide_margin) < math.inf:  # a compiled graph cannot hold math.isfinite
        raise ValueError(f"guide_margin must be finite, got {guide_margin}")


def check_temperature(temperature: float | Tensor, objective: Objective) -> None:
    """Raises unless τ is finite and positive, and has a gradient wherever it requires one."""
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1:
            raise ValueError(
                f"temperature must have one element, got shape {tuple(temperature.shape)}"
            )
        if not temperature.is_floating_point():
            raise TypeError(f"temperature must be a floating-point tensor, got {temperature.dtype}")
        if temperature.requires_grad and objective.tau_gradient is None:
            why = (
                "a detached α does not pass a gradient to it (detach_alpha=False does)"
                if objective.uses_temperature
                else "it has none"
            )
            raise ValueError(f"temperature must not require grad with {objective}: {why}")
        if temperature.device.type != "cpu" or as_operator(temperature):
            return
        value = temperature.detach().item()
    elif isinstance(temperature, bool) or not isinstance(temperature, Real):
        raise TypeError(
            f"temperature must be a float or a tensor, got {type(temperature).__name__}"
        )
    else:
        value = temperature
    if not value > 0 or value == math.inf:
        raise ValueError(f"temperature must be finite and > 0, got {value}")
    if not LEAST_TAU <= value <= LARGEST_TAU:
        raise ValueError(f"temperature must be between 1e-15 and 1e15, got {value}")


def check_scale_and_bias(scale: float | Tensor, bias: float | Tensor) -> None:
    """Raises unless both are finite numbers of float32's range, or tensors of one element."""
    for name, given in (("scale", scale), ("bias", bias)):
        if isinstance(given, Tensor):
            if given.numel() != 1:
                raise ValueError(f"{name} must have one element, got shape {tuple(given.shape)}")
            if not given.is_floating_point():
                raise TypeError(f"{name} must be a floating-point tensor, got {given.dtype}")
            if given.device.type != "cpu" or as_operator(given):
                continue
            value = given.detach().item()
        elif isinstance(given, bool) or not isinstance(given, Real):
            raise TypeError(f"{name} must be a float or a tensor, got {type(given).__name__}")
        else:
            value = given
        if not abs(value) <= LARGEST_LOGIT:
            raise ValueError(f"{name} must be finite and between -1e15 and 1e15, got {value}")


def loss_of(
    z1: Tensor, z2: Tensor, temperature: Temperature, call: Call, ids: Tensor | None
) -> Tensor:
    """The loss of a call that `make_call` has checked, prepared or not."""
    found = key = None
    if not torch.compiler.is_dynamo_compiling():
        found, key = steps.again(z1, z2, temperature, call, ids)
    return (found or evaluate(z1, z2, temperature, call, ids, key))[0]


def evaluate(
    z1: Tensor,
    z2: Tensor,
    temperature: Temperature,
    call: Call,
    ids: Tensor | None = None,
    key: Any = None,
    opinion: Opinion | None = None,
) -> tuple[Tensor, str, str]:
    """The loss, the backend that computed it and why.

    It checks everything that `make_call` has not checked. ``key``: what `steps.again` returned for
    this call, which has no plan yet. ``opinion``: of a guide.
    """
    with_guide = opinion is not None
    z1, z2 = of_one_dtype(z1, z2)
    if with_guide and isinstance(call.objective, ClosedForm):  # its sums of rows know no guide
        call = replace(call, objective=call.objective.of_each_pair)
    if call.process_group is not None:
        return evaluate_over_ranks(z1, z2, temperature, call, ids, opinion)
    readings = () if key is None else call.objective.look()  # before its functions are checked
    tau, bound, why = bind(z1, z2, temperature, call, ids is not None, with_guide)
    guide = opinion(z1, call)[0] if with_guide else None
    own_ids = None if ids is None else checked_ids("ids", ids, z1)
    if z1.shape[0] < bound.objective.fewest_pairs:
        with without_autocast(z1.device):
            return no_negatives(z1, z2, tau, bound), bound.backend, why
    need = Need.of(z1, z2, tau)
    if key is not None:
        # the plan moves the temperature and the ids, which may lie on another device at every call
        given = temperature if isinstance(temperature, Tensor) else None
        inputs, tau_of = (z1, z2, given, ids), functools.partial(as_number, temperature)
        if steps.prepare(inputs, tau_of, call, bound, key, why):
            found, _ = steps.again(z1, z2, temperature, call, ids)
            if found is not None:
                return found
    if native.serves(bound, need, with_guide) and native.plain(z1, z2, tau):
        prepared = eager.prepare(z1, tau, bound, need, why, readings)
        if key is not None and None not in readings:
            call.remember(key, prepared)
        same_id = (
            None if ids is None else SameId.of_views(own_ids, bound, len(z1), prepared.plan.wide)
        )
        return prepared.losses(z1, z2, tau, prepared, same_id, guide)[0], bound.backend, why
    with without_autocast(z1.device):
        return _loss(z1, z2, tau, bound, own_ids, guide), bound.backend, why


def no_negatives(z1: Tensor, z2: Tensor, tau: Tensor, call: BoundCall) -> Tensor:
    """The loss of a batch of one pair, on every rank: 0, with a graph whose gradients are 0."""
    anchors = call.anchors(z1.shape[0])
    losses = zero_with_graph(z1, z2, tau).expand(anchors)
    return losses.sum() if call.reduction != "none" else call.reduce(losses)


def zero_with_graph(*tensors: Tensor) -> Tensor:
    """() 0 in the accumulation dtype of the first tensor, with gradient 0 in all; NaN stays NaN."""
    wide = accumulation_dtype(tensors[0].dtype)
    return torch.stack([(x * 0).sum().to(tensors[0].device, wide) for x in tensors]).sum()


def _loss(
    z1: Tensor,
    z2: Tensor,
    tau: Tensor,
    call: BoundCall,
    ids: Tensor | None,
    guide: Guide | None,
) -> Tensor:
    wide = accumulation_dtype(z1.dtype)
    if call.backend == "reference":
        operands = (x.to(wide) for x in (z1, z2, tau))
        losses = reference.row_losses(
            *operands,
            call.objective,
            call.similarity,
            call.negatives,
            call.symmetric,
            ids,
            call.most_gap(wide),
            guide,
        )
        return call.reduce(losses)
    if isinstance(call.objective, ClosedForm):
        same_id = SameId.of_views(ids, call, z1.shape[0], wide)
        layout = Layout.of(call, z1.shape[0])
        return call.reduce(closed_form(z1, z2, call, layout, same_id=same_id))
    if as_operator(z1):
        return compiled_op.loss(z1, z2, tau, call, ids)
    return AlphaCLFunction.apply(z1, z2, tau, call, Need.of(z1, z2, tau), ids, guide)[0]


@breaks_the_graph  # sizes and errors of the other processes are read on the host
def evaluate_over_ranks(
    z1: Tensor,
    z2: Tensor,
    temperature: Temperature,
    call: Call,
    ids: Tensor | None = None,
    opinion: Opinion | None = None,
) -> tuple[Tensor, str, str]:
    """As `evaluate`, with a process group, and without the negatives that a guide calls false."""
    tau, bound, why, left_out, failure = None, None, "", None, None
    if isinstance(call.objective, ClosedForm) and ids is not None:  # its sums know no ids of ranks
        call = replace(call, objective=call.objective.of_each_pair)
    try:
        with_guide = opinion is not None
        tau, bound, why = bind(z1, z2, temperature, call, ids is not None, with_guide)
        ids = None if ids is None else checked_ids("ids", ids, z1)
        guide = opinion(z1, call) if with_guide else (None, 0.0)
        left_out = distributed.LeftOut(ids, *guide)
    except (
        Exception
    ) as error:  # the other processes wait for this one, so they must learn of any error
        failure = error
    ranks = distributed.agree(call.process_group, z1, z2, tau, bound, failure, left_out)
    if ranks.total < bound.objective.fewest_pairs:
        return no_negatives(z1, z2, tau, bound), bound.backend, why
    loss = distributed.global_loss(z1, z2, tau, replace(bound, ranks=ranks))
    return loss, bound.backend, f"{why}; {ranks.strategy} over {ranks.world}"


def bind(
    z1: Tensor,
    z2: Tensor,
    temperature: Temperature,
    call: Call,
    with_ids: bool = False,
    with_guide: bool = False,
) -> tuple[Tensor, BoundCall, str]:
    """Checks embeddings and temperature.

    Returns τ (or SigLIP's scale and bias) as a tensor, the call bound to its backend, and why that
    backend.
    """
    if isinstance(temperature, tuple):
        check_scale_and_bias(*temperature)
    else:
        check_temperature(temperature, call.objective)
    check_embeddings(z1, z2, fewest=1 if call.process_group is None else 0)
    # with several processes all must choose the same backend, whatever their rows
    few = call.process_group is None and _few_long_rows(z1)
    return bind_temperature(
        z1, temperature, call, with_ids, few_long_rows=few, with_guide=with_guide
    )


#: Rows of both views below which the blocks of `cpu`, padded to a few dozen rows, take more memory
#: than a dense loss, and the features from which that matters.
FEW_ROWS, LONG_ROWS = 40, 65_536


def _few_long_rows(z: Tensor) -> bool:
    """Whether N pairs are better served in the tiles of `blocked`.

    The features come first: their number must not make a compiled graph ask for N.
    """
    return z.shape[1] >= LONG_ROWS and z.is_cpu and 2 * z.shape[0] < FEW_ROWS


def bind_temperature(
    z1: Tensor,
    temperature: Temperature,
    call: Call,
    with_ids: bool = False,
    reduction: str | None = None,
    few_long_rows: bool = False,
    with_guide: bool = False,
) -> tuple[Tensor, BoundCall, str]:
    """As `bind`, for embeddings and a temperature that have been checked.

    ``reduction`` replaces the call's; ``few_long_rows``: see `_few_long_rows`.
    """
    if not as_operator(z1):  # else the operator checks
        call.objective.check()
    given = temperature if isinstance(temperature, tuple) else (temperature,)
    values = tuple(map(known, given))
    if isinstance(temperature, tuple):
        tau = torch.stack([as_number(x, z1) for x in given])
    elif isinstance(temperature, Tensor):
        tau = temperature.reshape(()).to(z1.device)
    else:
        tau = as_number(temperature, z1)
    operands = ("ids",) * with_ids + ("max_gap",) * (call.max_gap is not None)
    operands += ("guide",) * with_guide
    objective, wgmma = call.objective, False
    if z1.is_cuda and call.similarity == "cosine" and values[0] is not None and not operands:
        mode = ops.mode_of(z1.dtype, call.precision, z1.device)
        params = objective.params(1.0)
        wgmma = ops.cuda.has_wgmma_kernels(mode, objective.kind, params, z1.shape[1])
    asked = "blocked" if few_long_rows and call.backend == "auto" else call.backend
    backend, why = ops.choose(
        asked, z1.device, z1.dtype, call.precision, objective.kind, operands, wgmma
    )
    if asked != call.backend:
        why = f"fewer than {FEW_ROWS} rows of {LONG_ROWS:,} features or more take less memory in it"
    return tau, call.bind(backend, values, reduction), why


def known(given: float | Tensor) -> float | None:
    """The value of a number, if the host can read it without waiting for a device."""
    if not isinstance(given, Tensor):
        return None if changes(given) else float(given)
    if given.device.type == "cpu" and not as_operator(given):
        return given.detach().item()
    return None


#: Above every temperature, scale and bias.
_FAR = 1e300


def changes(number: float) -> bool:
    """Whether a number is an input of a compiled graph, so that its next value needs no new one."""
    if not torch.compiler.is_compiling():
        return False
    # imported with the compiler, and slowly
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    # of a constant the comparison is known; of an input only that it is below infinity
    return not statically_known_true(number < _FAR)


def shown(number: float | Tensor) -> str:
    """A number or a parameter for ``repr``; a tensor's value on a CPU only: others would wait."""
    if not isinstance(number, Tensor):
        return f"{number:.6g}"
    kind = "learnable" if number.requires_grad else "tensor"
    return f"{number.item():.6g} ({kind})" if number.device.type == "cpu" else f"({kind})"


def as_number(given: float | Tensor, z: Tensor) -> Tensor:
    """() in the accumulation dtype on the device of z."""
    wide = accumulation_dtype(z.dtype)
    if isinstance(given, Tensor):
        return given.reshape(()).to(z.device, wide)
    if changes(given):  # torch.full would make a constant of it
        return torch.ones((), dtype=wide, device=z.device) * given
    return torch.full((), float(given), dtype=wide, device=z.device)


def of_one_dtype(*tensors: Any) -> tuple[Any, ...]:
    """Tensors of rows in the dtype to which torch promotes theirs, if they have several.

    Autocast may leave one tower in bfloat16 and the other in float32. Every gradient is cast back.
    Anything that is no tensor of rows is left to the checks. A negation that PyTorch has put off,
    as in ``z.conj().imag``, is carried out, because the kernels read memory.
    """
    if not torch.compiler.is_compiling():  # an operator of a graph gets none
        tensors = tuple(
            x.resolve_neg() if isinstance(x, Tensor) and x.is_neg() else x for x in tensors
        )
    dtypes = {x.dtype for x in tensors if isinstance(x, Tensor)}
    if len(dtypes) < 2 or not dtypes.issubset(DTYPES):
        return tensors
    dtype = functools.reduce(torch.promote_types, dtypes)
    return tuple(x.to(dtype) if isinstance(x, Tensor) else x for x in tensors)


def check_embeddings(z1: Tensor, z2: Tensor, fewest: int = 1) -> None:
    """Raises unless z1 and z2 are (N, D) float tensors of one shape, dtype and device with N ≥
    ``fewest``.
    """
    check_rows("z1", z1)
    check_rows("z2", z2)
    if z2.shape != z1.shape:
        raise ValueError(f"z2 must have the shape of z1 {tuple(z1.shape)}, got {tuple(z2.shape)}")
    if z2.dtype != z1.dtype:
        raise TypeError(f"z2 must have the dtype of z1 ({z1.dtype}), got {z2.dtype}")
    if z2.device != z1.device:
        raise ValueError(f"z2 must be on the device of z1 ({z1.device}), got {z2.device}")
    if z1.shape[0] < fewest:
        rows = "1 row" if fewest == 1 else f"{fewest} rows"
        raise ValueError(f"z1 must have at least {rows}, got shape {tuple(z1.shape)}")
    if z1.shape[1] < 1:
        raise ValueError(f"z1 must have at least 1 column, got shape {tuple(z1.shape)}")


def check_rows(name: str, z: Tensor, fewest: int = 0) -> None:
    """Raises unless z is a plain (N, D) float tensor with N ≥ ``fewest``."""
    if not isinstance(z, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(z).__name__}")
    if type(z) not in (Tensor, torch.nn.Parameter) and hasattr(z, "device_mesh"):
        raise TypeError(
            f"{name} must be a plain tensor, got a DTensor (pass z.to_local() or z.full_tensor())"
        )
    if torch.jit.is_tracing():
        raise TypeError(
            f"{name} must not be recorded by torch.jit.trace, which sees none of the loss's "
            "arithmetic (use torch.export, or trace the encoder without its loss)"
        )
    if z.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got {z.layout}")
    if z.dtype not in DTYPES:
        expected = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(
            f"{name} must have one of the dtypes {expected}, got "
            f"{str(z.dtype).removeprefix('torch.')}"
        )
    if z.dim() != 2:
        raise ValueError(f"{name} must have shape (N, D), got {tuple(z.shape)}")
    if z.shape[0] < fewest or (fewest and z.shape[1] < 1):
        raise ValueError(
            f"{name} must have at least {fewest} row{'s' * (fewest > 1)} and 1 column, "
            f"got shape {tuple(z.shape)}"
        )


def check_alike(name: str, rows: Tensor, name_of_other: str, other: Tensor) -> None:
    """Raises unless two tensors of rows have the same width, dtype and device."""
    if (rows.shape[1], rows.dtype, rows.device) != (other.shape[1], other.dtype, other.device):
        raise ValueError(
            f"{name} must have the width, dtype and device of {name_of_other} "
            f"({other.shape[1]}, {other.dtype}, {other.device}), "
            f"got {rows.shape[1]}, {rows.dtype}, {rows.device}"
        )


def checked_ids(name: str, ids: Tensor, rows: Tensor) -> Tensor:
    """The ids on the device of rows (n, D); raises unless they are n integers."""
    expected = f"{name} must be an integer tensor of shape {tuple(rows.shape[:1])}, got"
    if not isinstance(ids, Tensor):
        raise TypeError(f"{expected} {type(ids).__name__}")
    if ids.dtype not in INTEGERS:
        raise TypeError(f"{expected} {str(ids.dtype).removeprefix('torch.')}")
    if ids.shape != rows.shape[:1]:
        raise ValueError(f"{expected} shape {tuple(ids.shape)}")
    return ids.to(rows.device)


def one_of(name: str, value: Any, valid: tuple[Any, ...]) -> None:
    """Raises ValueError unless the value is a valid one."""
    if value not in valid:
        raise ValueError(
            f"{name} must be one of {', '.join(repr(v) for v in valid)}, got {value!r}"
        )
