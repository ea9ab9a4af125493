"""A training step of any module, written down: what autograd makes, keeps and frees, and what it computes.

The module is built, and a forward and a backward pass of it run, on tensors that have shapes and no values (torch's
fake tensors): a model of any size takes seconds and hardly any memory. Events are noted in order:

    ["+", t, bytes]      memory t is made, and ["-", t] gone with the last reference to it, autograd's own among them
    ["l", t, bytes]      the same after the last block: logits, and the loss
    [">", n, module, g]  a module is entered, for the n-th time of all, and ["<", n, module, g] left; g: whether a
                         gradient flows to what it is given, or from what it gives
    ["b>", n], ["b<", n] its backward pass begins, and ends
    ["c", t, elements]   t is a parameter cast to 16 bits where it is read
    ["u", t, s, elements]  t is the gradient s of such a cast in fp32
    ["s", t, elements]   t is the sum of gradients of one parameter
    ["g", name, t, last] t is the gradient of a parameter; last: nothing else refers to it
    ["|"]                the backward pass begins

All for two sequences and for three: what grows does so evenly, and bytes become [in any case, for each sequence].
`scaling.estimate.replay` plays them under any backend.
"""

import contextlib
import functools
import gc
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.flop_counter import flop_registry

from scaling.engine.blocks import prepare_blocks
from scaling.engine.precision import DTYPES, compute_in
from scaling.errors import UserError
from scaling.estimate.work import DIRECTIONS
from scaling.groups import resolve_groups
from scaling.inventory import parameters, sequences
from scaling.inventory.recorded import SCHEMA_VERSION, fingerprint, keep_inventory
from scaling.models import on_cpu
from scaling.models.recipe import ModelRecipe, canonical_name, module_path
from scaling.models.recorded import blocks_in, build, inventory_found, parameters_of, recorded_recipe
from scaling.objectives import Objective, build_objective
from scaling.rehearse import made_up, made_up_tokens, no_gc
from scaling.run_folder import versions
from scaling.spec import Spec
from scaling.spec.sections import HuggingFaceVla, Recorded, caches_features
from scaling.trace import fake_tensors, replaced

aten = torch.ops.aten
Event = list[Any]
Operation = tuple[str | None, str, str, tuple[int, ...], tuple[int, ...]]
"""Block, direction, kind as in scaling/estimate/work.py, what does not grow with the sequences, sizes."""

_FACTORS = {aten.mm: (0, 1), aten.addmm: (1, 2), aten.bmm: (0, 1), aten.baddbmm: (1, 2)}
"""Matrix products: where their factors stand."""
_ATTENTION = ("_scaled_dot_product", "_flash_attention", "_efficient_attention")


class Recorder(TorchDispatchMode):
    """Notes what the passes of `module` do while it is entered; what exists before is not noted."""

    def __init__(self, module: nn.Module, blocks: Sequence[str], inputs: Any) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.work: list[Operation] = []
        """Of each operation that is more than a view."""
        self._module = module
        self._blocks = set(blocks)
        self._there: dict[int, tuple[ref[torch.UntypedStorage], int]] = {}
        """Live storages by address: a weak reference, and the number."""
        self._count = self._entered = 0
        self._backward = False
        self._to_come = set(blocks)
        """Blocks that the forward pass has not left."""
        self._at: list[str | None] = [None]
        """Blocks at work, the innermost last."""
        self._known = {t.untyped_storage()._cdata for t in tree_leaves(inputs) if isinstance(t, Tensor)}
        self._parameters = {t.untyped_storage()._cdata for t in module.parameters()}
        self._known |= self._parameters | {t.untyped_storage()._cdata for t in module.buffers()}
        self._origins: dict[int, tuple[str, list[int], int]] = {}
        """Of each tensor that a backward pass makes: by what operation, from what, and its place in `work`."""
        self._beside: set[int] = set()
        """Places in `work` of casts of gradients."""

    # ------------------------------------------------------------ tensors

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        before = {t.untyped_storage()._cdata for t in given}
        sources = [self._there[at][1] for at in before if at in self._there]
        result = func(*args, **(kwargs or {}))
        packet = getattr(func, "_overloadpacket", func)
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if packet is aten._scaled_dot_product_flash_attention_backward:
            self._note_flash_work(*args[1:3])
        new = [t for t in made if self._note(t, packet, sources, before)]
        if packet is aten._to_copy and before & self._parameters:
            return result  # what such casts cost depends on the backend: scaling/estimate/strategies.py knows
        if new or _writes(func):
            self._note_work(func, args, kwargs or {}, given, made, result)
        return result

    def _note(self, tensor: Tensor, packet: Any, sources: list[int], before: set[int]) -> bool:
        """Note the memory of a tensor if it is new."""
        storage = tensor.untyped_storage()
        at = storage._cdata
        if at in self._there or at in self._known:
            return False
        number, self._count = self._count, self._count + 1
        self._there[at] = (ref(storage, functools.partial(self._gone, at, number)), number)
        if packet is aten._to_copy and before & self._parameters:
            self.events.append(["c", number, tensor.numel()])
        else:
            after = not self._to_come and not self._backward
            self.events.append(["l" if after else "+", number, storage.nbytes()])
            if self._backward:
                self._origins[number] = (str(packet), sources, len(self.work))
        return True

    def _note_flash_work(self, query: Tensor, key: Tensor) -> None:
        """What the kernel makes and frees within itself: the queries' gradient in fp32, a sum for each row, and for
        grouped queries the gradients of keys and values of each head (csrc/flash_attn).
        """
        sizes = [4 * query.numel(), 4 * (query.numel() // query.shape[-1])]
        if key.shape[1] < query.shape[1]:
            sizes += 2 * [query.numel() * query.element_size()]
        numbers = range(self._count, self._count + len(sizes))
        self._count += len(sizes)
        self.events += [["+", number, size] for number, size in zip(numbers, sizes, strict=True)]
        self.events += [["-", number] for number in numbers]

    def _gone(self, at: int, number: int, _: object) -> None:
        self._there.pop(at, None)
        self.events.append(["-", number])

    def number(self, tensor: Tensor) -> int | None:
        """Of the memory of a tensor; None of what was there before."""
        found = self._there.get(tensor.untyped_storage()._cdata)
        return None if found is None else found[1]

    # ------------------------------------------------------------ work

    def _note_work(
        self, func: Any, args: Any, kwargs: Any, given: list[Tensor], made: list[Tensor], result: Any
    ) -> None:
        packet = getattr(func, "_overloadpacket", func)
        place = (self._at[-1], "backward" if self._backward else "forward")
        if packet in _FACTORS:
            first, second = (args[index].shape for index in _FACTORS[packet])
            batch = first[0] if len(first) == 3 else 1
            self.work.append((*place, "products", (), (batch, first[-2], first[-1], second[-1])))
        elif packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=result)
            if packet.__name__.startswith(_ATTENTION):
                about = (
                    _attended(packet, args),
                    int(_is_causal(func, args, kwargs)),
                    int("backward" in packet.__name__),
                )
                self.work.append((*place, "attention", about, (flops,)))
            else:
                self.work.append((*place, "other", (), (flops,)))
        else:
            read = given[1:] + made if packet is aten.embedding else given  # of the table no more than is written
            moved = sum(t.numel() * t.element_size() for t in (*read, *made))
            self.work.append((*place, "bytes", (), (moved,)))

    # ------------------------------------------------------------ modules and parameters

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Note modules that are entered and left, and gradients that are there."""
        handles: list[Any] = []
        for path, module in self._module.named_modules():
            path = module_path(path)
            handles.append(module.register_forward_pre_hook(functools.partial(self._enter, path), with_kwargs=True))
            handles.append(module.register_forward_hook(functools.partial(self._leave, path)))
        for name, parameter in self._module.named_parameters():
            if parameter.requires_grad:
                take = functools.partial(self._take, canonical_name(name))
                handles.append(parameter.register_post_accumulate_grad_hook(take))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        number, self._entered = self._entered, self._entered + 1
        module.__dict__.setdefault("_entries", []).append(number)
        inputs = _with_gradient((args, kwargs))
        self.events.append([">", number, path, int(bool(inputs))])
        if path in self._blocks:
            self._at.append(path)
        if not inputs:
            return None
        return _replaced((args, kwargs), _Mark.apply(functools.partial(self._back, "b<", number, path), *inputs))

    def _leave(self, path: str, module: nn.Module, _: Any, output: Any) -> Any:
        number = module.__dict__["_entries"].pop()
        outputs = _with_gradient(output)
        self.events.append(["<", number, path, int(bool(outputs))])
        if path in self._blocks:
            self._at.pop()
            self._to_come.discard(path)
        if not outputs:
            return None
        return _replaced(output, _Mark.apply(functools.partial(self._back, "b>", number, path), *outputs))

    def _back(self, kind: str, number: int, path: str) -> None:
        self.events.append([kind, number])
        if path in self._blocks:
            # A block whose input wants no gradient does not say when it is done: the next that begins says it.
            self._at[-1:] = [path if kind == "b>" else None]

    def _take(self, name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.events.append(["g", name, self.number(parameter.grad)])
        parameter.grad = None

    def turn(self) -> None:
        """The backward pass begins."""
        self.events.append(["|"])
        self._backward = True

    # ------------------------------------------------------------ afterwards

    def told(self, *, casts: bool) -> list[Event]:
        """The events, with what is known of gradients only when they have arrived; `casts`: parameters are read in 16
        bits."""
        made = {event[1]: place for place, event in enumerate(self.events) if event[0] == "+"}
        for place, event in enumerate(self.events):
            if event[0] != "g":
                continue
            if casts:
                self._tell_gradient(event[2], made, summed=False)
            event.append(int(self._goes_at_once(event[2], place)))
        return self.events

    def _goes_at_once(self, number: int, place: int) -> bool:
        """Whether memory is gone before anything else is made, after the event at this place."""
        for after in range(place + 1, len(self.events)):
            kind, *about = self.events[after]
            if kind in ("+", "c"):
                return False
            if kind == "-" and about == [number]:
                return True
        return True

    def computed(self) -> list[Operation]:
        """The work, once the events are told: without casts of gradients, as without those of parameters."""
        return [operation for place, operation in enumerate(self.work) if place not in self._beside]

    def _tell_gradient(self, number: int, made: dict[int, int], *, summed: bool) -> None:
        """A gradient that was cast back to fp32, or the sum of some."""
        operation, sources, place = self._origins.get(number, ("", [], 0))
        event = self.events[made[number]] if number in made else None
        if event is None or event[0] != "+":
            return
        if operation == "aten._to_copy" and len(sources) == 1:
            event[:] = ["u", number, sources[0], event[2] // 4]
            self._beside.add(place)
        elif operation == "aten.add" and not summed:
            for source in sources:
                self._tell_gradient(source, made, summed=True)
            event[:] = ["s", number, event[2] // 4]


class _Mark(torch.autograd.Function):
    """The same tensors; says when their gradients are all there."""

    @staticmethod
    def forward(ctx: Any, act: Callable[[], None], *tensors: Tensor) -> Any:
        ctx.act = act
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.act()
        return (None, *gradients)


def _with_gradient(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.requires_grad]


def _replaced(values: Any, tensors: Sequence[Tensor]) -> Any:
    """`values` with other tensors in place of those that want a gradient."""
    leaves, structure = tree_flatten(values)
    others = iter(tensors)
    found = [next(others) if isinstance(leaf, Tensor) and leaf.requires_grad else leaf for leaf in leaves]
    return tree_unflatten(found, structure)


def _attended(packet: Any, args: Any) -> int:
    """Tokens of the keys, which follow the queries; in a backward pass a gradient comes before both."""
    return args[2 if "backward" in packet.__name__ else 1].shape[-2]


def _is_causal(func: Any, args: Any, kwargs: Any) -> bool:
    named = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    return bool(named.get("is_causal"))


def _writes(func: Any) -> bool:
    """Whether an operation changes what it is given; one that neither does so nor makes anything is a view."""
    schema = getattr(func, "_schema", None)
    return schema is not None and schema.is_mutable


# ---------------------------------------------------------------- recording a spec

MODES = ("none", "selective", "full")
KERNELS = ("gpu", "cpu")
COUNTS = (2, 3)
"""Samples of the two recordings of which each size is worked out."""


@dataclass(frozen=True)
class Recording:
    """What is recorded."""

    spec: Spec
    recipe: ModelRecipe
    frozen: Collection[str]
    objective: Objective


def record(
    job: Recording, kernels: str, mode: str, *, zero3_linear: bool = False
) -> tuple[list[Event], list[dict[str, Any]]]:
    """Events and work of the passes of a spec's model, with the kernels of a "gpu" or a "cpu", blocks checkpointed in
    this mode; `zero3_linear`: linear layers are DeepSpeed's. Raises UserError where a step does not do the same for two
    sequences as for three.
    """
    fewer, more = (_passes(job, kernels, mode, count, zero3_linear) for count in COUNTS)
    counts = [count * sequences(job.spec) for count in COUNTS]
    try:
        events = [_merged(a, b, counts) for a, b in zip(fewer[0], more[0], strict=True)]
        work: dict[str | None, dict[str, Counter[Any]]] = {}
        for one, other in zip(fewer[1], more[1], strict=True):
            if one[:4] != other[:4]:
                raise ValueError(f"{one} and {other}")
            block, way, kind, fixed, few = one
            sizes = tuple(tuple(_line(*pair, counts)) for pair in zip(few, other[4], strict=True))
            work.setdefault(block, {way: Counter() for way in DIRECTIONS})[way][kind, fixed, sizes] += 1
    except ValueError as error:
        raise UserError(
            "`model` must do the same for any number of sequences, but does not for two and for three "
            f"({str(error)[:200]}); its memory cannot be told from its shape"
        ) from None
    return events, _parts(work)


def _parts(work: dict[str | None, dict[str, Counter[Any]]]) -> list[dict[str, Any]]:
    """As scaling/estimate/work.py has it: alike blocks together, what is outside of them last."""
    found: list[dict[str, Any]] = []
    for block, ways in sorted(work.items(), key=lambda one: one[0] is None):
        part = {way: _direction(counted) for way, counted in ways.items()}
        alike = next((one for one in found if one["blocks"] and all(one[way] == part[way] for way in part)), None)
        if block is not None and alike is not None:
            alike["blocks"].append(block)
        else:
            found.append({"blocks": [] if block is None else [block], **part})
    return found


def _direction(counted: Counter[Any]) -> dict[str, Any]:
    products, attention = [], Counter[tuple[int, ...]]()
    sums = {"other": [0, 0], "bytes": [0, 0]}
    for (kind, fixed, sizes), count in counted.items():
        if kind == "products":
            products.append([*map(list, sizes), count])
            continue
        ((base, more),) = sizes
        if kind == "attention":
            attention[*fixed, 0] += count * base
            attention[*fixed, 1] += count * more
        else:
            sums[kind] = [sums[kind][0] + count * base, sums[kind][1] + count * more]
    kinds = dict.fromkeys(key[:-1] for key in attention)
    return {
        "products": products,
        "attention": [[*kind, [attention[*kind, 0], attention[*kind, 1]]] for kind in kinds],
        **sums,
        "kernels": sum(counted.values()),
    }


def _merged(fewer: Event, more: Event, counts: Sequence[int]) -> Event:
    sized = fewer[0] in ("+", "l")
    if len(fewer) != len(more) or (fewer[:2] if sized else fewer) != (more[:2] if sized else more):
        raise ValueError(f"{fewer} and {more}")
    return [*fewer[:2], *_line(fewer[2], more[2], counts)] if sized else fewer


def _line(fewer: int, more: int, counts: Sequence[int]) -> list[int]:
    """[in any case, for each sequence], of the sizes for so many; what there is one of for a pair of sequences may be
    off by a byte."""
    slope = (more - fewer) // (counts[1] - counts[0])
    return [fewer - counts[0] * slope, slope]


def _passes(
    job: Recording, kernels: str, mode: str, count: int, zero3_linear: bool
) -> tuple[list[Event], list[Operation]]:
    spec, recipe = job.spec, job.recipe
    dtype = DTYPES[spec.precision]
    gc.collect()
    with fake_tensors(), no_gc():
        module = recipe.build()
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(canonical_name(name) not in job.frozen)
        if dtype != torch.float32:
            compute_in(module, dtype)
        prepare_blocks(module, recipe.blocks, checkpointing=mode, compiled=False)
        module.train()
        batch = made_up(spec, count)
        recorder = Recorder(module, recipe.blocks, list(vars(batch).values()))
        functions: list[tuple[Any, str, Any]] = list(_GPU_KERNELS) if kernels == "gpu" else []
        functions += [(F, "linear", _KeepingLinear.apply)] if zero3_linear else []
        with contextlib.ExitStack() as stack:
            for home, name, function in functions:
                stack.enter_context(replaced(home, name, function))
            stack.enter_context(recorder)
            stack.enter_context(recorder.watching())
            loss = job.objective(module, batch)
            recorder.turn()
            loss.backward()
            events = len(recorder.events)
        found = recorder.told(casts=dtype != torch.float32)[:events]
        del loss
    return found, recorder.computed()


# ---------------------------------------------------------------- a GPU's kernels


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Flash attention; the memory-efficient kernel where there is a mask, or more than 16 bits."""
    if attn_mask is None and query.dtype != torch.float32:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], 1) for t in (key, value))
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
    )[0]


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """A kernel that keeps a mask of bytes; a CPU multiplies by noise."""
    if inplace or not training or not p:
        return (torch.dropout_ if inplace else torch.dropout)(input, p, training)
    return torch.native_dropout(input, p, True)[0]


class _RMSNorm(torch.autograd.Function):
    """One kernel, which keeps its input and 1/root of each row."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        root = hidden.new_empty(hidden.shape[: hidden.dim() - weight.dim()], dtype=torch.float32)
        ctx.save_for_backward(hidden, weight, root)
        return torch.empty_like(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, _ = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (torch.empty_like(hidden) if wanted[0] else None, torch.empty_like(weight) if wanted[1] else None)


def _rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    return _RMSNorm.apply(input, input.new_ones(*normalized_shape) if weight is None else weight)


_GPU_KERNELS = (
    (F, "scaled_dot_product_attention", _attention),
    (F, "dropout", _dropout),
    (F, "rms_norm", _rms_norm),
    (on_cpu, "eager_on_cpu", lambda _: False),
)
"""Functions of which a GPU keeps something else for the backward pass than a CPU."""


class _KeepingLinear(torch.autograd.Function):
    """DeepSpeed's linear layer at stage 3, which keeps all it is given, whatever trains (runtime/zero/linear.py)."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(input, weight, bias)
        output = input.matmul(weight.t())
        if bias is not None:
            output += bias
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        input, weight, bias = ctx.saved_tensors
        wanted = (*ctx.needs_input_grad, False)
        found: list[Tensor | None] = [None, None, None]
        rows = gradient.reshape(-1, gradient.shape[-1])
        if wanted[0]:
            found[0] = gradient.matmul(weight)
        if wanted[1]:
            found[1] = rows.t().matmul(input.reshape(-1, input.shape[-1]))
        if bias is not None and wanted[2]:
            found[2] = rows.sum(0)
        return tuple(found[: len(ctx.needs_input_grad)])


# ---------------------------------------------------------------- the inventory file


def _words_of(module: nn.Module, length: int) -> int:
    """Logits that it gives for each token."""
    output = module(made_up_tokens(2, 2, length).inputs)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise UserError(
            "`model` must return logits, [batch, sequence, vocabulary], for token ids, but returns a "
            f"{type(output).__name__}; correct its module"
        )
    return logits.shape[-1]


def write_inventory(spec: Spec, allow_import: Sequence[str], tell: Callable[[str], None]) -> None:
    """Record the model of `spec`, and write its inventory file; `tell` hears what is under way. Raises UserError."""
    model = spec.model
    assert isinstance(model, Recorded) and model.inventory is not None, "there is a file to write"
    tell("building the model")
    with fake_tensors():
        module = build(model, allow_import)
        listed = parameters_of(module)
        found = inventory_found(model, module, blocks_in(model, module), allow_import)
        if not isinstance(model, HuggingFaceVla):
            compute_in(module, DTYPES[spec.precision])
            found = replace(found, vocab_size=_words_of(module, spec.data.sequence_length))
    bare = model.model_copy(update={"inventory": None})
    keep_inventory(bare, found)  # for who asks for the adapters, before there is a file
    groups = resolve_groups(spec.param_groups, spec.optimizer, parameters(bare, spec.lora))
    frozen = {name for group in groups if group.frozen for name in group.names}
    objective = build_objective(spec.objective, allow_import, from_logits=True)
    recipe = recorded_recipe(bare, found.blocks, spec.seed, allow_import, lora=spec.lora)
    job = Recording(spec.model_copy(update={"model": bare}), recipe, frozen, objective)
    events: dict[str, dict[str, list[Event]]] = {kernels: {} for kernels in KERNELS}
    work: dict[str, list[dict[str, Any]]] = {}
    for kernels in KERNELS:
        for mode in MODES:
            tell(f"a step with a {kernels.upper()}'s kernels, activation checkpointing {mode}")
            events[kernels][mode], counted = record(job, kernels, mode)
            if kernels == "gpu":
                work[mode] = counted
            if frozen and mode != "selective":  # in which ZeRO-3 has torch's own layer
                name = f"{kernels}-zero3"
                events.setdefault(name, {})[mode] = record(job, kernels, mode, zero3_linear=True)[0]
    document = {
        "schema_version": SCHEMA_VERSION,
        "model": fingerprint(model),
        "parameters": listed,
        "blocks": found.blocks,
        "buffer_bytes": found.buffer_bytes,
        "vocab_size": found.vocab_size,
        "linears": found.linears,
        "seen": found.seen,
        "ledger": {
            "sequence_length": spec.data.sequence_length,
            "precision": spec.precision,
            "objective": spec.objective.model_dump(mode="json"),
            "lora": spec.lora.model_dump(mode="json") if spec.lora else None,
            "features": caches_features(spec.data),
            "frozen": sorted(frozen),
            "versions": versions(),
            "events": events,
            "work": work,
        },
    }
    try:
        Path(model.inventory).write_text(json.dumps(document, separators=(",", ":")) + "\n", encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(
            f"`model.inventory` must be a file that can be written, but {model.inventory[:200]!r} is not: {reason}"
        ) from None
