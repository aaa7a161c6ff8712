"""A frozen network: the pure function (parameters, x) -> f(x; parameters) behind an ``nn.Module``.

No other file but `freezing` and `selection` touches the inside of an ``nn.Module``. It is split into

* a *skeleton*: the module's structure with its tensors replaced by empty ones on the meta device, called through
  ``torch.func.functional_call``;
* *frozen tensors*: copies of parameters and buffers, in non-persistent buffers, which follow ``.to()`` of their owner,
  and are in neither ``parameters()`` nor ``state_dict()``;
* a *layout*: which parameters are differentiated and where each stands in a flat P-vector.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate, chain, groupby
from typing import Any, Self, final

import torch
from torch import Tensor, nn

from gpntk._checks import check_tensors
from gpntk._types import Extract, OutputSelection, ParameterSelection
from gpntk.errors import InputError, SelectionError
from gpntk.memory import Lock, frozen, is_out_of_memory
from gpntk.network.adapters import Adapter
from gpntk.network.batches import Arguments, head
from gpntk.network.freezing import Needs, Skeleton, cast, check_module, check_real, find_needs, with_gradient
from gpntk.network.outputs import Entry, extracted, selected
from gpntk.network.primitives import by_primitives, differentiable_operations
from gpntk.network.probing import check_readout, check_rows, first_run, scripted_calls, two_rows
from gpntk.network.selection import layer_name, readout_name, select_parameters


@final
class FrozenNetwork(nn.Module):
    """A network frozen where it is, as a pure function of the selected parameters and of x.

    Args:
        module: The network. Its weights are copied, so later training of ``module`` changes nothing here.
        parameters: Which parameters J(x) = df(x; w)/dw differentiates: ``None`` for all (whether or not they require
            grad), a glob or list of globs over parameter names, ``"readout"`` for the last parametrised layer, or a
            predicate ``(name, parameter) -> bool``.
        input_shape: Shape of one input as the network wants it, e.g. ``(1, 28, 28)``; x then arrives flat, `[N, D]`.
        extract: Which of the things that the network returns is its output `[N]` or `[N, C]`: the name of an entry,
            ``"mean"`` (over the tokens of ``attention_mask``), ``"cls"`` (the first) or ``"last"`` for a vector per
            token, or a function. Default: a tensor, ``logits``, the only entry, or the first of a tuple; ``repr`` and a
            line of the log say which.
        inputs: A batch as the network takes it, from which ``network.adapter`` learns to pack such batches into x: see
            `gpntk.network.Adapter`. Instead of ``input_shape``.

    Raises:
        InputError: ``inputs`` is no batch that the network takes.
        NetworkError: Stochastic or batch-statistics layers in train mode, NaN or infinite weights, integer, complex or
            mixed dtypes, mixed devices, a module that cannot be copied.
        SelectionError: A selection that matches no parameter.

    Example:
        >>> import torch
        >>> network = FrozenNetwork(torch.nn.Linear(3, 2))
        >>> network(torch.zeros(5, 3)).shape, network.num_params
        (torch.Size([5, 2]), 8)
    """

    names: tuple[str, ...]
    """Names of the selected parameters, in the order of the flat layout."""
    slices: Mapping[str, slice]
    """Where each selected parameter stands in the P-vector."""
    shapes: Mapping[str, torch.Size]
    adapter: Adapter
    """Packs what the network takes into x, and unpacks it."""
    extract: Extract | str | None
    entry: Entry
    """Which entry of what the network returns is its output."""
    output: OutputSelection

    def __init__(
        self,
        module: nn.Module,
        parameters: ParameterSelection = None,
        input_shape: Sequence[int] | None = None,
        extract: Extract | str | None = None,
        inputs: Any = None,
    ) -> None:
        super().__init__()
        check_module(module)
        if not (extract is None or callable(extract) or (isinstance(extract, str) and extract)):
            raise SelectionError(f"extract={extract!r}: give a function, the name of an output, or None.")
        named = dict(module.named_parameters())
        selected = select_parameters(module, named, parameters)
        check_real({name: named[name] for name in selected})
        self._lay_out(selected, {name: parameter.shape for name, parameter in named.items()})
        if not (inputs is None or input_shape is None):
            raise InputError("inputs and input_shape both say what the network takes: give one of them.")
        self.adapter = Adapter.of_shape(input_shape) if inputs is None else Adapter.of(inputs, module)
        self.output = "full"
        self._group_of: Mapping[str, str] = {}
        self.extract = extract
        self._readout = readout_name(module) if isinstance(parameters, str) and parameters == "readout" else None
        self.entry = Entry()
        # By the width and dtype of x: other ones are other inputs, to be checked.
        self._num_outputs: dict[tuple[int, torch.dtype], int] = {}
        self._cast: dict[tuple[torch.dtype, torch.device], dict[str, Tensor]] = {}
        self._live: dict[tuple[torch.dtype, torch.device], nn.Module] = {}
        self._needs = [Needs()]
        self._identity = [object()]
        # No nn.Module, hence not registered: GPyTorch's .to(), .train(), requires_grad_() and state_dict() stay away.
        self._skeleton = Skeleton(module)
        self.hooked = frozenset(self._skeleton.hooks)  # parameters whose gradients go through hooks of their own
        self.scripted: set[str] = set()  # what `num_outputs` has seen it call of TorchScript
        self._tensor_names = tuple(chain(named, dict(module.named_buffers())))
        with torch.inference_mode(False):
            for index, tensor in enumerate(chain(named.values(), module.buffers())):
                self.register_buffer(f"frozen_{index}", tensor.detach().clone(), persistent=False)
        if inputs is not None and not isinstance(inputs, Adapter):
            # Says at once whether the network runs on it, and which entry of what it returns is its output.
            self.num_outputs(self.adapter.pack(head(inputs), self.dtype, self.device))

    # --- the function ------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """f(x; w) `[N, C]` for x `[N, D]`, in x's dtype; ``parameters`` replaces some of the frozen ones by name."""
        check_tensors(x=x)
        if not x.is_floating_point():
            raise InputError(f"x holds {x.dtype}: pass x.double(), or what network.adapter.pack(batch) gives.")
        try:
            return self._run(x, parameters, self._needs[0])
        except Exception as error:
            if isinstance(error, InputError) or is_out_of_memory(error) or parameters or not self._settle(x):
                raise
        return self._run(x, parameters, self._needs[0])

    def differentiated(self, x: Tensor, all_weights: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """f(x; w) `[N, C]` by the module itself, and its selected parameters, to be differentiated by plain autograd.

        What the module does in a backward pass, to recompute activations say, finds its weights in their places. Hold
        ``lock`` until the last pass: the module is the same one every time. With ``all_weights``, those that are not
        selected require grad as well.
        """
        dtype = self.compute_dtype(x.dtype)
        key = (dtype, x.device)
        if key not in self._live:
            with torch.inference_mode(False):
                self._live[key] = by_primitives(self._skeleton.filled(self.tensors(dtype, x.device), shared=True))
        named = dict(self._live[key].named_parameters())
        for name, parameter in named.items():
            parameter.requires_grad_(parameter.is_floating_point() and (all_weights or name in self.slices))
        arguments = self.adapter.arguments(x.to(dtype))
        outputs = self._outputs(self._live[key](*arguments.args, **arguments.kwargs), arguments, x.shape[0]).to(x.dtype)
        return outputs, {name: named[name] for name in self.names}

    def selected(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """The selected parameters by name: the point w* at which Jacobians are taken."""
        tensors = self.tensors(dtype, device)
        return {name: tensors[name] for name in self.names}

    def tensors(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """All frozen parameters and buffers by name; floating ones cast to ``dtype``."""
        key = (dtype, device)
        if key not in self._cast:
            buffers = zip(self._tensor_names, self._buffers.values(), strict=True)
            with torch.inference_mode(False):
                self._cast[key] = {
                    name: tensor.to(device=device, dtype=cast(tensor.dtype, dtype))
                    for name, tensor in buffers
                    if tensor is not None
                }
        return self._cast[key]

    def select_output(self, output: OutputSelection) -> FrozenNetwork:
        """The same network with C = 1: output number ``output``, or sum_c f_c / sqrt(C) for ``"sum"``."""
        return self._view(output=output, _num_outputs={})

    def thaw(self) -> nn.Module:
        """A module like the one that was frozen, with its weights as they were; training it changes nothing here."""
        return self._skeleton.filled(self.tensors(self.dtype, self.device))

    def restrict(self, names: Collection[str]) -> FrozenNetwork:
        """The same network with only some of the selected parameters still selected, in the same order."""
        view = self._view()
        view._lay_out([name for name in self.names if name in names], self.shapes)
        return view

    def select_readout(self) -> FrozenNetwork:
        """The same network with its readout selected, the last layer with parameters, whatever was selected before."""
        view = self._view(_num_outputs={}, _readout=readout_name(self._skeleton.module))
        named = dict(self._skeleton.module.named_parameters())
        shapes = {name: parameter.shape for name, parameter in named.items()}
        view._lay_out(select_parameters(self._skeleton.module, named, "readout"), shapes)
        return view

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which the network runs on x of ``dtype``: another one where forward allows one only."""
        return self._needs[0].dtype or dtype

    @property
    def lock(self) -> Lock:
        """Held while the network runs: hooks, and weights put in place, change a module."""
        return self._skeleton.lock

    # --- sizes and layout --------------------------------------------------------------------------------------

    @property
    def num_params(self) -> int:
        """P, the number of selected parameters."""
        return sum(shape.numel() for shape in self.shapes.values())

    @property
    def summary(self) -> str:
        """How many parameters are selected, of how many, and which entry of what is returned is the output."""
        total = sum(map(torch.numel, self._skeleton.module.parameters()))
        return f"{self.num_params:,} of {total:,} parameters{self.entry.name and f', outputs are {self.entry.name}'}"

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which the weights are stored; computations run in the dtype of x."""
        return self._first.dtype

    @property
    def device(self) -> torch.device:
        """Device of the frozen weights."""
        return self._first.device

    @property
    def version(self) -> object:
        """Changes whenever the stored weights do, by a cast or a move."""
        return self._identity[0]

    @property
    def layers(self) -> tuple[tuple[str, slice], ...]:
        """Name and slice of the P-vector of each layer that owns selected parameters, in order."""
        runs = [(name, [self.slices[one] for one in run]) for name, run in groupby(self.names, key=layer_name)]
        return tuple((name, slice(run[0].start, run[-1].stop)) for name, run in runs)

    @property
    def groups(self) -> tuple[tuple[str, tuple[slice, ...]], ...]:
        """Name and columns of J of each group with a prior variance of its own: each layer, or what `grouped` says."""
        if not self._group_of:
            return tuple((name, (columns,)) for name, columns in self.layers)
        members: dict[str, list[slice]] = {name: [] for name in dict.fromkeys(self._group_of.values())}
        for name in self.names:
            members[self.group_of(name)].append(self.slices[name])
        return tuple((name, tuple(columns)) for name, columns in members.items() if columns)

    def group_of(self, name: str) -> str:
        """The group that a parameter belongs to."""
        return self._group_of.get(name) or layer_name(name)

    def grouped(self, groups: Mapping[str, Sequence[str]]) -> FrozenNetwork:
        """The same network with other groups: the names of each one's parameters, by the group's name."""
        return self._view(_group_of={name: group for group in groups for name in groups[group]})

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Split `[..., P]` into one `[..., *shape]` per selected parameter."""
        batch = vector.shape[:-1]
        return {name: vector[..., self.slices[name]].reshape((*batch, *self.shapes[name])) for name in self.names}

    def flatten(self, parameters: Mapping[str, Tensor], batch_dims: int = 0) -> Tensor:
        """Join one `[..., *shape]` per selected parameter into `[..., P]`."""
        return torch.cat(
            [p.reshape((*p.shape[:batch_dims], -1)) for p in map(parameters.__getitem__, self.names)], dim=-1
        )

    @property
    def known_outputs(self) -> int | None:
        """C where a row of x was seen already; else None."""
        return next(iter(self._num_outputs.values()), None)

    def num_outputs(self, x: Tensor) -> int:
        """C, found by running the network once on two rows of ``x`` `[..., N, D]`, which also checks its behaviour.

        Raises:
            NetworkError: The output is stochastic, depends on the other rows of the batch, or is not `[N]` or `[N, C]`.
            SelectionError: ``output`` is no output of the network; ``"readout"`` is not the last layer executed.
        """
        check_tensors(x=x)
        if x.dim() < 2:
            raise InputError(f"x has shape {tuple(x.shape)}: give [..., N, D].")
        seen = (x.shape[-1], x.dtype)
        if seen not in self._num_outputs:
            if x.shape[-1] == 0 or x.shape[:-1].numel() == 0:
                raise InputError(f"x is empty, shape {tuple(x.shape)}: the network is probed on at least one row.")
            pair = two_rows(x.detach().flatten(0, -2))
            with self.lock, scripted_calls(self.scripted):
                both = first_run(self, pair, self.adapter)
            self._num_outputs[seen] = check_rows(self, both, pair, self.compute_dtype(pair.dtype))
            if self._readout is not None:
                with self.lock:
                    check_readout(self, self._skeleton.module, self._readout, pair)
        return self._num_outputs[seen]

    # --- nn.Module's own protocol ------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002
        """Do nothing: a frozen network stays in the mode it was frozen in."""
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._cast.clear()
        self._live.clear()
        self._identity[0] = object()
        return super()._apply(fn, recurse)

    def __repr__(self) -> str:
        return f"FrozenNetwork({self.summary})"

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenNetwork:
        return self._shell()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cast": {}, "_live": {}}

    def _lay_out(self, names: Sequence[str], shapes: Mapping[str, torch.Size]) -> None:
        self.names = tuple(names)
        self.shapes = {name: shapes[name] for name in names}
        ends = list(accumulate(shape.numel() for shape in self.shapes.values()))
        self.slices = {
            name: slice(start, end) for name, start, end in zip(names, [0, *ends][: len(names)], ends, strict=True)
        }

    def _view(self, **changes: Any) -> FrozenNetwork:
        """This network with other attributes, over the same dictionaries of tensors: it is moved and cast with it."""
        view = FrozenNetwork.__new__(FrozenNetwork)
        view.__dict__ = {**self.__dict__, **changes}
        return view

    def _shell(self) -> FrozenNetwork:
        """A new object over the same tensors; moving or casting it leaves the original alone."""
        shell = FrozenNetwork.__new__(FrozenNetwork)
        shell.__dict__ = {key: copy.copy(value) for key, value in self.__dict__.items()}
        return shell

    @property
    def _first(self) -> Tensor:
        # A parameter: all that are real share one dtype, and all one device.
        return next(tensor for tensor in self._buffers.values() if tensor is not None and tensor.is_floating_point())

    def _run(self, x: Tensor, parameters: Mapping[str, Tensor] | None, needs: Needs) -> Tensor:
        dtype = needs.dtype or x.dtype
        tensors = self.tensors(dtype, x.device)
        if needs.gradients and parameters is None:
            tensors = {name: with_gradient(tensor) for name, tensor in tensors.items()}
        given = dict(parameters or {})
        if needs.dtype is not None:
            given = {name: tensor.to(cast(tensor.dtype, dtype)) for name, tensor in given.items()}
        with self.lock, differentiable_operations(), needs.mode():
            arguments = self.adapter.arguments((frozen(x) if x.is_inference() and needs.gradients else x).to(dtype))
            returned = self._skeleton.run({**tensors, **given}, arguments)
        outputs = self._outputs(returned, arguments, x.shape[0]).to(x.dtype)
        return outputs.detach() if needs.gradients and not torch.is_grad_enabled() else outputs

    def _settle(self, x: Tensor) -> bool:
        """Find out what else the network needs to run on x; whether that helps."""
        row = frozen(x)[:1]
        needs = find_needs(lambda needs: self._run(row, None, needs), x.dtype, self.dtype)
        self._needs[0] = needs or self._needs[0]
        return needs is not None

    def _outputs(self, returned: Any, arguments: Arguments, num_rows: int) -> Tensor:
        outputs, entry = extracted(returned, self.extract, arguments)
        self.entry.say(entry)
        return selected(outputs, self.output, num_rows)


def freeze(
    network: nn.Module,
    parameters: ParameterSelection = None,
    input_shape: Sequence[int] | None = None,
    extract: Extract | str | None = None,
    inputs: Any = None,
) -> FrozenNetwork:
    """The network frozen where it is, as a pure function of the selected parameters; see `FrozenNetwork`.

    Networks of tokens, dictionaries, several tensors or graphs are given a batch as they take it, ``inputs``; then
    ``network.adapter.pack(batch)`` makes the rows x that kernels take.

    A network that is frozen already is returned as a new object over the same weights, with its readout selected for
    ``parameters="readout"``; moving or casting the new object leaves the old one alone.

    Raises:
        SelectionError: The network is frozen already, and another argument asks for another selection or shape.

    Example:
        >>> import torch, gpntk
        >>> gpntk.freeze(torch.nn.Linear(3, 2), parameters="*bias").num_params
        2
        >>> words = torch.nn.Sequential(torch.nn.Embedding(9, 2), torch.nn.Flatten(), torch.nn.Linear(6, 1))
        >>> frozen = gpntk.freeze(words, inputs=torch.tensor([[1, 2, 3], [4, 5, 6]]))
        >>> gpntk.NTKKernel(frozen)(frozen.adapter.pack(torch.tensor([[1, 2, 8]]))).shape
        torch.Size([1, 1])
    """
    if not isinstance(network, FrozenNetwork):
        return FrozenNetwork(network, parameters, input_shape, extract, inputs)
    if parameters not in (None, "readout") or not (input_shape is extract is inputs is None):
        raise SelectionError(
            "the network is frozen already: give parameters, input_shape, extract and inputs to gpntk.freeze instead."
        )
    frozen = copy.deepcopy(network)
    return frozen if parameters is None else frozen.select_readout()
