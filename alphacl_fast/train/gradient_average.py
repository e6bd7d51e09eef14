"""The average of the gradients over the ranks, whose messages travel while the backward still runs.

Parameters form buckets, in the reverse order of the network's, which is about the order in which a
backward computes their gradients. As soon as a bucket's gradients are there, its all-reduce starts
and the backward goes on (as in Li et al., "PyTorch Distributed", arXiv:2006.15704).

The buckets follow from the parameters alone and are sent in their order, so every rank sends the
same messages in the same order, and a resumed run adds the ranks' gradients in the order of an
uninterrupted one. A parameter that has no gradient on a rank counts as zero there.

Synchronised batch normalisation sends messages during the backward, too. With it every rank must
use the same parameters; otherwise the messages of two ranks do not match.
"""

from collections.abc import Iterable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .process_context import ProcessContext, peers

BUCKET_BYTES = 4 * 2**20  # a bucket is full from here on; large enough that bandwidth counts


class GradientAverage:
    """Average every gradient over the ranks, once per step; a single rank does nothing.

    Args:
        network: parameters whose gradients the last backward of a step completes, in the network's
            order. They are hooked for good.
        others: parameters whose gradients are complete before, such as the loss's.
        context: the ranks.
    """

    def __init__(
        self,
        network: list[nn.Parameter],
        others: list[nn.Parameter],
        context: ProcessContext,
    ):
        self.context = context
        self.buckets = buckets(network, others) if context.size > 1 else []
        #: Gradients that each bucket waits for; None outside a step's last backward.
        self.waits: list[int] | None = None
        self.sent: list[tuple[Tensor, dist.Work]] = []
        hooked = {*network}
        self.counts = [sum(p in hooked for p in bucket) for bucket in self.buckets]
        for number, bucket in enumerate(self.buckets):
            for parameter in hooked.intersection(bucket):
                parameter.register_post_accumulate_grad_hook(partial(self._arrived, number))

    def begin(self) -> None:
        """Send the gradients of the backward that follows, the last one of the step."""
        self.waits, self.sent = [*self.counts], []

    def _arrived(self, number: int, _: Tensor) -> None:
        """Note that a gradient of bucket ``number`` is complete; send what may be sent."""
        if self.waits is None:  # of an earlier micro-batch
            return
        self.waits[number] -= 1
        while len(self.sent) < len(self.waits) and self.waits[len(self.sent)] == 0:
            self._send()

    def _send(self) -> None:
        bucket = self.buckets[len(self.sent)]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([grad.flatten() for grad in grads])
        work = dist.all_reduce(flat, group=self.context.group_of(flat), async_op=True)
        self.sent.append((flat, work))

    def finish(self) -> None:
        """Send what no hook has sent, wait for all messages, and set every gradient."""
        with peers():
            while len(self.sent) < len(self.buckets):
                self._send()
            for bucket, (flat, work) in zip(self.buckets, self.sent, strict=True):
                work.wait()
                _unpack(flat.div_(self.context.size), bucket)
        self.waits, self.sent = None, []


def buckets(
    network: Iterable[nn.Parameter], others: Iterable[nn.Parameter] = ()
) -> list[list[nn.Parameter]]:
    """Group parameters into buckets of at least ``BUCKET_BYTES``, except the last one.

    Args:
        network: parameters in the network's order; the groups have the reverse order.
        others: parameters that join the first bucket, whose gradients are there already.
    """
    found, size = [[*others]], 0
    for parameter in reversed([*network]):
        if size >= BUCKET_BYTES:
            found.append([])
            size = 0
        found[-1].append(parameter)
        size += parameter.nbytes
    return [bucket for bucket in found if bucket]


def _unpack(flat: Tensor, bucket: list[nn.Parameter]) -> None:
    """Set the gradients of ``bucket``, each in its memory format, to the parts of ``flat`` (n,)."""
    parts = flat.split([parameter.numel() for parameter in bucket])
    for parameter, part in zip(bucket, parts, strict=True):
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)
        parameter.grad.copy_(part.view(parameter.shape))
