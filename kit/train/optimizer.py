"""AdamW (Loshchilov & Hutter, 2019) and the learning-rate schedule of the paper's Table 2.

fp32 weights get torch's own AdamW. bf16 weights need one thing more. Near 0.02, neighbouring bf16 numbers lie
1e-4 apart, an update at lr 5e-5 is smaller than half of that, and rounding to nearest would drop it.
Stochastic rounding goes up or down with the probability that makes the mean exact, so that updates arrive on
average, without an fp32 copy of the weights. But at RL's lr of 5e-7, its noise is as large as the learning.
With exact_weights, a run's default, each bf16 weight keeps the 16 bits that it lacks as one more state, and
nothing is rounded away: the updates are those of fp32 weights.

    name        weights        bytes per parameter besides weight and gradient
    adamw       fp32           8       torch.optim.AdamW
    adamw8bit   bf16 or fp32   2.03    kit.kernels.adamw8bit: 8-bit states, in CPU memory with offload
                bf16           4.03    with exact_weights
    auto                               adamw for fp32 weights, adamw8bit for bf16 weights and with offload
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from kit.kernels.adamw8bit import adamw8bit_, check_settings, init_state, state_layout, state_slice
from kit.models.weights import check_same
from kit.train.offload import SideStream, host_empty

OPTIMIZERS = ("auto", "adamw", "adamw8bit")
TRAINED = ({torch.float32}, {torch.bfloat16})  # dtypes of weights


def cosine_with_warmup(step: int, num_steps: int, warmup_ratio: float) -> float:
    """Return the learning rate's factor in step 0..num_steps-1: a linear warm-up, then half a cosine to 0."""
    warmup = math.ceil(warmup_ratio * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(num_steps - warmup, 1)))


class Slabs(SideStream):
    """Two slabs of a card's memory for offloaded optimizer states, which are copied to the card piece by
    piece.

    While the states in one slab are updated, the previous ones are copied back and the next ones copied in.

    NOT RUN ON A GPU. One side stream does the copies. The order that makes this right:
    - slabs are created, and filled with zeros, by the compute stream, for which the side stream waits once.
    - a slab is filled after it was emptied: both copies are on the side stream, in this order.
    - states are updated after they arrived: the compute stream waits for the event of their copy.
    - states are copied back after they were updated: the side stream waits for the compute stream.
    The slabs are allocated once: reusing memory of two streams through the allocator would need a wait too.
    """

    def __init__(self, num_elements: int, device: torch.device, *, exact: bool = False):
        super().__init__(device)
        like = torch.empty((), device=device).expand(num_elements)
        self.num_elements = num_elements
        self.slabs, self.turn = [init_state(like, exact=exact) for _ in range(2)], 0
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(device))

    def fetch(self, on_host: dict[str, Tensor]) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
        """Start copying states to the card. Return their copies, and the event that marks their arrival."""
        self.turn = 1 - self.turn
        on_card = {name: self.slabs[self.turn][name][: len(x)] for name, x in on_host.items()}
        with torch.cuda.stream(self.stream):  # None on a CPU, where a copy is complete when it returns
            for name, x in on_host.items():
                on_card[name].copy_(x, non_blocking=True)
        return on_card, self._event()

    def write_back(self, on_host: dict[str, Tensor], on_card: dict[str, Tensor]) -> None:
        """Start copying updated states back."""
        with self._beside():
            for name, x in on_host.items():
                x.copy_(on_card[name], non_blocking=True)


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with 8-bit states on bf16 or fp32 parameters, in one pass over memory.

    Random bits are keyed by (seed, step, parameter, element): they are the same after resuming and in any
    order of updates.

    offload: keep the states in CPU memory, pinned if the parameters are on a card, and copy them to the card
        one slab at a time: 4 bytes per parameter cross the bus per step, 8 if exact. Read them through
        state_dict(), which waits for the copies.
    exact: keep the rest of each bf16 parameter beside its states, instead of rounding stochastically.
    params, lr, betas, eps and weight_decay are those of torch.optim.AdamW: tensors or groups with settings of
        their own.
    """

    SLAB = 2**22  # numbers whose offloaded states are copied together: 8 MiB per slab (16), there are two

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=1e-2,
        *,
        seed=0,
        offload=False,
        exact=False,
    ):
        self.offload, self.exact, self.slabs = offload, exact, None
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, settings | {"seed": seed})

    def add_param_group(self, param_group: dict) -> None:
        """Add parameters, before the first step or after any. Their states are created at once.

        Raises ValueError for settings out of range, and what torch's optimizers raise.
        """
        settings = self.defaults | param_group
        check_settings(**{name: settings[name] for name in ("lr", "betas", "eps", "weight_decay")})
        super().add_param_group(param_group)
        self._find_places()
        for parameter in owned(param_group):
            self._state_of(parameter)

    def load_state_dict(self, state_dict: dict) -> None:
        """Load what state_dict() returned, bit for bit: the states keep dtype and device, which torch's
        own method would make the parameter's.

        Its hooks see no states. Raises ValueError, before anything is changed, for states of another
        optimizer or of other parameters.
        """
        for parameter in (parameter for group in self.param_groups for parameter in owned(group)):
            self._state_of(parameter)  # if it was cleared
        keys = dict.fromkeys(key for group in state_dict["param_groups"] for key in group["params"])
        loaded = dict(enumerate(state_dict["state"].get(key, {}) for key in keys))
        stored, states = flat_states(loaded), states_of(self)
        needed = {name: x for name, x in states.items() if loaded.get(int(name.split(".")[0]))}
        remedy = "load one of an AdamW8bit with the same parameters and the same `exact`"
        check_same(stored, needed, "state_dict", remedy=remedy)

        own = self.state
        super().load_state_dict({**state_dict, "state": {}})  # refuses other numbers of parameters
        self.state = own
        for name, tensor in states.items():
            tensor.copy_(stored.get(name, torch.zeros(())))  # none = never updated

    def state_dict(self) -> dict:
        self._settle()
        return super().state_dict()

    def __getstate__(self) -> dict:
        self._settle()
        return super().__getstate__() | {"offload": self.offload, "exact": self.exact, "slabs": None}

    def _settle(self) -> None:
        """Wait until offloaded states are whole in CPU memory, for whoever reads them next."""
        if self.slabs is not None and self.slabs.stream is not None:
            self.slabs.stream.synchronize()

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._find_places()

    def _find_places(self) -> None:
        """Number the parameters of all groups, and have slabs that are long enough for each."""
        grouped = [(parameter, group) for group in self.param_groups for parameter in group["params"]]
        self.place = {parameter: (index, group) for index, (parameter, group) in enumerate(grouped)}
        most = min(self.SLAB, max((parameter.numel() for parameter in self.place), default=0))
        if self.offload and grouped and (self.slabs is None or self.slabs.num_elements < most):
            self.wait()
            self.slabs = Slabs(most, grouped[0][0].device, exact=self.exact)

    def _state_of(self, parameter: torch.nn.Parameter) -> dict[str, Tensor]:
        """Return the parameter's step and states, created if it has none."""
        if not self.state[parameter]:
            exact = self.exact and parameter.dtype == torch.bfloat16
            layout = state_layout(parameter.numel(), exact)
            states = {name: self._zeros(parameter, dtype, size) for name, dtype, size in layout}
            # fp32, because a default of bf16 would count to 256 only
            self.state[parameter] = {"step": torch.tensor(0.0, dtype=torch.float32), **states}
        return self.state[parameter]

    def _zeros(self, parameter: torch.nn.Parameter, dtype: torch.dtype, size: int) -> Tensor:
        if not self.offload:
            return torch.zeros(size, dtype=dtype, device=parameter.device)
        # never on the card, which may lack the room: an embedding's are twice as large as itself
        return host_empty(size * dtype.itemsize, for_card=parameter.is_cuda).view(dtype).zero_()

    @torch.no_grad()
    def update(
        self, parameter: torch.nn.Parameter, gradient: Tensor | None = None, *, first: int = 0
    ) -> None:
        """Do one step for this parameter alone, or for a slice of it.

        gradient: None = the parameter's own. Of a slice: the gradient of the flattened elements from `first`
        on (a multiple of 256), fp32 or the parameter's dtype. The slices of one step must follow one another
        and cover the parameter.
        """
        self._apply(self._pieces(parameter, parameter.grad if gradient is None else gradient, first))

    @torch.no_grad()
    def step(self, closure=None):
        """Update all parameters that have a gradient.

        closure: computes loss and gradients, called first. Return what it returned, None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with_gradient = (parameter for parameter in self.place if parameter.grad is not None)
        self._apply(
            piece for parameter in with_gradient for piece in self._pieces(parameter, parameter.grad, 0)
        )
        self.wait()
        return loss

    def wait(self) -> None:
        """Make the card wait until offloaded states are back in CPU memory."""
        if self.slabs is not None:
            self.slabs.wait_for_copies()

    def _pieces(self, parameter: torch.nn.Parameter, gradient: Tensor, first: int) -> Iterator[tuple]:
        """Yield (numbers, gradient, states, settings) of each kernel call, and count the step at the end."""
        index, group = self.place[parameter]
        state = dict(self._state_of(parameter))
        step = int(state.pop("step")) + 1
        flat, gradient = parameter.view(-1)[first : first + gradient.numel()], gradient.reshape(-1)
        settings = {name: group[name] for name in ("betas", "eps", "weight_decay", "seed")}
        settings |= {"lr": float(group["lr"]), "step": step, "index": index}

        slab = max(len(flat), 1) if self.slabs is None else self.SLAB
        for start in range(0, len(flat), slab):
            part = slice(start, min(start + slab, len(flat)))
            states = state_slice(state, first + start, part.stop - start)
            yield flat[part], gradient[part], states, settings | {"first_element": first + start}

        if first + len(flat) == parameter.numel():
            # a new tensor, because a fake one knows its value only if it was never changed in place
            self.state[parameter]["step"] = torch.tensor(float(step), dtype=torch.float32)

    def _apply(self, pieces: Iterator[tuple]) -> None:
        """Update one piece after another, while the offloaded states of the next one are copied."""
        if self.slabs is None:
            for numbers, gradient, state, settings in pieces:
                adamw8bit_(numbers, gradient, state, **settings)
            return
        arrived = deque()
        for numbers, gradient, on_host, settings in pieces:
            arrived.append((numbers, gradient, on_host, settings, *self.slabs.fetch(on_host)))
            if len(arrived) == 2:
                self._update_on_card(*arrived.popleft())
        if arrived:
            self._update_on_card(*arrived.popleft())

    def _update_on_card(self, numbers, gradient, on_host, settings, on_card, loaded) -> None:
        self.slabs.wait_for(loaded)
        adamw8bit_(numbers, gradient, on_card, **settings)
        self.slabs.write_back(on_host, on_card)


def owned(group: Mapping) -> list[torch.nn.Parameter]:
    """Return the parameters of a group whose states this process keeps: all, or its share among ranks."""
    parameters = group["params"]
    return [parameters[i] for i in group["owned"]] if "owned" in group else parameters


def share_out(sizes: Sequence[int], count: int) -> list[int]:
    """Return which of `count` ranks owns each parameter: the largest first, each to the rank with the least.

    sizes: numbers per parameter. No parameter is cut, so one share is at least the embedding's size.
    """
    owners, loads = [0] * len(sizes), [0] * count
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += sizes[i]
    return owners


def states_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the states of all parameters by name: "0.exp_avg" is one of the first parameter's."""
    return flat_states(optimizer.state_dict()["state"])


def flat_states(states: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{index}.{name}": x for index, state in states.items() for name, x in state.items()}


def make_optimizer(
    model: torch.nn.Module,
    *,
    lr: float,
    name: str = "auto",
    weight_decay: float = 0.0,
    betas=(0.9, 0.999),
    seed: int = 0,
    offload: bool = False,
    exact_weights: bool = False,
    share: tuple[int, int] = (0, 1),
) -> torch.optim.Optimizer:
    """Return AdamW for the model's trainable parameters.

    name: one of OPTIMIZERS. offload: keep adamw8bit's states in CPU memory. exact_weights: keep the rest of
    bf16 weights; fp32 weights have none. share: (rank, number of ranks) that share the states
    (kit.train.sum_gradients): this one keeps those of the parameters that it owns, and updates no others.
    Raises ValueError for an unknown name, for parameters of several dtypes or none, and for adamw with bf16
    weights or with offload.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    dtypes = {parameter.dtype for parameter in parameters}
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer is {name!r}; pass one of {', '.join(OPTIMIZERS)}")
    if dtypes not in TRAINED:
        raise ValueError(
            f"trainable parameters are {sorted(map(str, dtypes)) or 'none'}; load float32 or bfloat16 weights"
        )
    if name == "auto":
        name = "adamw8bit" if dtypes == {torch.bfloat16} or offload else "adamw"
    settings = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
    group: dict = {"params": parameters}
    rank, count = share
    if count > 1:
        owners = share_out([parameter.numel() for parameter in parameters], count)
        group["owned"] = [i for i, owner in enumerate(owners) if owner == rank]
    if name == "adamw8bit":
        return AdamW8bit([group], **settings, seed=seed, offload=offload, exact=exact_weights)

    if offload:
        raise ValueError(
            "offload_optimizer is on but optimizer is adamw, whose states stay on the card; pass adamw8bit"
        )
    if dtypes == {torch.bfloat16}:
        raise ValueError(
            "optimizer is adamw but the weights are bfloat16, and rounding to nearest would drop small "
            "updates; pass adamw8bit, which keeps them, or load the model in float32"
        )
    return torch.optim.AdamW([group], **settings, fused=True)
