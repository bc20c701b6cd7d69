"""Sum the gradients of a step over the ranks of a run (kit/ranks.py) while the backward pass goes on.

Every rank has the whole model and trains on whole rows. That is the right way for the models of this kit, up
to 3B: in bf16, a parameter takes 2 bytes of weight, 2 of gradient and 4.03 of exact 8-bit states. A card of
24 GB so holds 3 billion parameters, activations aside, and 12 billion if gradients and states are in CPU
memory. Only a larger model has to be cut into pieces that lie on different cards, as FSDP2 does, and then
every layer's weights pass between the cards several times per row.

    gradients        each rank keeps                       what passes between ranks in a step
    on the card      all gradients and states              the gradients once, in buckets, to all ranks
    in CPU memory    gradients and states of the           the gradients once per row of rank 0, to their
                     parameters that it owns               owners, and then the new weights to all ranks

The second way is ZeRO-1 (Rajbhandari et al., 2020), with the gradients shared out, too. A rank needs 2 bytes
of CPU memory for the gradient of each parameter that it owns, and 4.03 for the states with offload_optimizer:
all ranks of a machine together need what one process does. A gradient reaches CPU memory through its owner's
card alone, so traffic on each card's bus falls with the number of ranks, too.

Sums have the gradients' dtype, as autograd's sums over rows have. torch.distributed returns the same bits on
every rank, so weights that were equal stay equal. NOT RUN ON A GPU: tensors on cards go through NCCL.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from kit.models.backbone import head_weight
from kit.ranks import Ranks
from kit.train.offload import HostGradients, trained
from kit.train.optimizer import share_out
from kit.train.weight_updates import UpdateAtEnd

BUCKET = 2**25  # bytes of gradients that are summed together: each sum costs some 50 us, whatever its size
IN_FLIGHT = 2  # buckets that are copied and summed at once, besides the gradients themselves


class InOrder:
    """Start the sums of buckets of parameters one after another, each once its gradients are complete.

    Why no rank waits for ever: ranks match their sums by the order in which they start them. That order is
    the buckets', which depends on the model alone. A bucket whose gradients are complete early, which may
    differ from rank to rank, waits for the ones before it. flush() starts what is left: all buckets on a rank
    that has no row, or those behind a parameter that this row's loss does not reach. So from restart() to
    flush() every rank starts every bucket once, and whatever else the ranks exchange comes after flush().

    start: is called with a bucket.
    """

    def __init__(self, buckets: Sequence[Sequence[nn.Parameter]], start: Callable[[Sequence], None]):
        self.buckets, self.start = buckets, start
        self.restart()

    def restart(self) -> None:
        self.missing = [set(bucket) for bucket in self.buckets]
        self.next = 0  # the first bucket that has not been started

    def ready(self, parameter: nn.Parameter) -> None:
        """Say that a parameter's gradient is complete. If it is in several buckets: for the next of them."""
        next(missing for missing in self.missing if parameter in missing).remove(parameter)
        while self.next < len(self.buckets) and not self.missing[self.next]:
            self._start_next()

    def flush(self) -> None:
        """Start all that is left."""
        while self.next < len(self.buckets):
            self._start_next()

    def _start_next(self) -> None:
        self.next += 1
        self.start(self.buckets[self.next - 1])


class _Facts:
    """What the ranks know of a step only together: its loss, and which parameters have a gradient at all.

    Without the latter, a parameter that no row reaches would decay, as it does not in one process.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], ranks: Ranks):
        self.parameters, self.ranks = parameters, ranks
        self.with_gradient: set[nn.Parameter] = set()  # on this rank, in this step

    def sum_(self, loss: Tensor, square: Tensor | None = None) -> tuple[Tensor, list[nn.Parameter]]:
        """Replace the loss by its sum. Return (the sum of squares, the parameters without any gradient)."""
        found = [float(parameter in self.with_gradient) for parameter in self.parameters]
        found = torch.tensor(found, dtype=torch.float64, device=loss.device)
        square = torch.zeros_like(loss) if square is None else square
        facts = torch.cat([loss.double().view(1), square.double().view(1), found])
        self.ranks.sum_(facts)
        loss.copy_(facts[0])
        counts = zip(self.parameters, facts[2:].tolist(), strict=True)
        return facts[1], [parameter for parameter, count in counts if not count]


def in_buckets(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Group parameters of one dtype, from the last to the first, as the backward pass completes them."""
    buckets: list[list[nn.Parameter]] = []
    for parameter in reversed(parameters):
        last = buckets[-1] if buckets else []
        fits = sum(p.nbytes for p in last) + parameter.nbytes <= BUCKET
        if last and fits and last[0].dtype == parameter.dtype:
            last.append(parameter)
        else:
            buckets.append([parameter])
    return buckets


class SumAtEnd(UpdateAtEnd):
    """UpdateAtEnd with the gradients' sums, which are computed while the last row's backward pass goes on.

    Every rank keeps all optimizer states and updates all weights.

    A tied embedding is the first parameter, so it is in the last bucket, and it is complete only when
    kit.train.head says so, after the last row. Sums of one parameter are in place. Other gradients are copied
    together and back, which takes room for IN_FLIGHT + 1 buckets.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, ranks: Ranks, *, max_grad_norm: float):
        super().__init__(optimizer, max_grad_norm=max_grad_norm, hook=self.use)
        self.ranks = ranks
        self.facts = _Facts(self.parameters, ranks)
        self.order = InOrder(in_buckets(self.parameters), self._start)
        self.running: deque[tuple] = deque()  # (bucket, its gradients, the sum)

    def begin(self, num_rows: int) -> None:
        super().begin(num_rows)
        self.rows_left = len(self.ranks.share(range(num_rows)))
        self.facts.with_gradient.clear()
        self.running.clear()
        self.order.restart()

    def before_backward(self, loss: Tensor) -> None:
        self.rows_left -= 1

    def use(self, parameter: nn.Parameter) -> None:
        """Take parameter.grad, to which autograd has added. Only in the last row is it complete."""
        if not self.rows_left:
            self.order.ready(parameter)

    def finish(self, loss: Tensor) -> Tensor:
        self.order.flush()
        while self.running:
            self._end_oldest()
        for parameter in self.facts.sum_(loss)[1]:
            parameter.grad = None
        return super().finish(loss)

    @torch.no_grad()
    def _start(self, bucket: Sequence[nn.Parameter]) -> None:
        for parameter in bucket:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            else:
                self.facts.with_gradient.add(parameter)
        flat = bucket[0].grad
        if len(bucket) > 1:
            flat = torch.cat([parameter.grad.reshape(-1) for parameter in bucket])
        self.running.append((bucket, flat, self.ranks.start_sum(flat)))
        while len(self.running) > IN_FLIGHT:
            self._end_oldest()

    @torch.no_grad()
    def _end_oldest(self) -> None:
        bucket, flat, work = self.running.popleft()
        work.wait()
        if len(bucket) > 1:
            parts = flat.split([parameter.numel() for parameter in bucket])
            for parameter, part in zip(bucket, parts, strict=True):
                parameter.grad.copy_(part.view_as(parameter))


class SharedHostGradients(HostGradients):
    """Add up each gradient in the CPU memory of its owner alone.

    Each row's gradients are summed over the ranks and go to their owners. So the ranks share as many rounds
    of sums as rank 0 has rows, which is at least as many as any other; a rank that has run out of rows gives
    zeros. The card holds HostGradients' gradients and as much again, in sums that are under way. Without
    recompute it may hold one more layer's, which wait for their turn.

    The gradient of an embedding that is its own head has two parts per row, the head's before the layers'
    gradients and the lookup's after them. Both go to the owner at once, so in bf16 their sum is rounded once
    more than in one process.
    """

    def __init__(self, model: nn.Module, ranks: Ranks):
        parameters = trained(model)
        self.ranks, self.facts = ranks, _Facts(parameters, ranks)
        owners = share_out([parameter.numel() for parameter in parameters], ranks.count)
        self.owners = dict(zip(parameters, owners, strict=True))
        if ranks.count > len(parameters):
            raise ValueError(
                f"{ranks.count} ranks share {len(parameters)} trained tensors, but with offload_gradients "
                "each owns at least one; start fewer ranks, or pass --no_offload_gradients"
            )
        super().__init__(model, [p for p in parameters if self.owners[p] == ranks.rank])
        order, weight = [[parameter] for parameter in reversed(parameters)], head_weight(model)
        if weight is model.get_input_embeddings().weight and weight.requires_grad:
            order.insert(0, [weight])
        self.order = InOrder(order, self._start)
        self.running: deque[tuple] = deque()  # (parameter, its gradient, the sum)
        self.in_round = self.ends = False  # whether a row has begun, and whether its backward pass is over

    def begin(self, num_rows: int) -> None:
        super().begin(num_rows)
        self.rounds_left = -(-num_rows // self.ranks.count)
        self.in_round = self.ends = False
        self.facts.with_gradient.clear()
        self.running.clear()

    def begin_row(self) -> None:
        if self.in_round:
            self.order.flush()
        self.order.restart()
        self.in_round = True
        self.rounds_left -= 1

    def add(self, parameter: nn.Parameter) -> None:
        """Send parameter.grad to its owner when its turn comes."""
        self.order.ready(parameter)
        if self.ends:  # the next row begins with the tied embedding's gradient, which must be gone by then
            self.order.flush()
            self.ends = False

    def pop(self, parameter: nn.Parameter) -> Tensor:
        """Return zeros for the tied embedding's second part: the owner has the first, and adds what comes."""
        self.ends = True
        return torch.zeros_like(parameter)

    def norm(self, loss: Tensor) -> Tensor:
        """Wait for all sums, and return the norm of those of all ranks."""
        while self.rounds_left:
            self.begin_row()
        self.order.flush()
        while self.running:
            self._end_oldest()
        norm = super().norm(loss)
        square, without = self.facts.sum_(loss, norm.double().square())
        for parameter in without:
            self.norms.pop(parameter, None)
        return square.sqrt().to(torch.promote_types(norm.dtype, torch.float32))

    def after_update(self) -> None:
        """Copy every updated weight from its owner to the other ranks."""
        copies = [self.ranks.start_copy(p.detach(), owner) for p, owner in self.owners.items()]
        for copy in copies:
            copy.wait()

    @torch.no_grad()
    def _start(self, bucket: Sequence[nn.Parameter]) -> None:
        (parameter,) = bucket
        gradient, parameter.grad = parameter.grad, None
        if gradient is None:
            gradient = torch.zeros_like(parameter)
        else:
            self.facts.with_gradient.add(parameter)
        work = self.ranks.start_sum(gradient, only_on=self.owners[parameter])
        self.running.append((parameter, gradient, work))
        while sum(gradient.nbytes for _, gradient, _ in self.running) > self.in_flight:
            self._end_oldest()

    def _end_oldest(self) -> None:
        parameter, gradient, work = self.running.popleft()
        work.wait()
        if self.owners[parameter] == self.ranks.rank:
            self.add_to_sum(parameter, [(0, gradient)])
