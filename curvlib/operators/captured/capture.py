r"""A batch's product as two flat graphs of tensor operations.

The product of a batch is a function :math:`q(\theta, x, v)`, linear in the vector :math:`v`. Its
operations, those of autograd's backward passes included, are recorded on fake tensors (shapes
without numbers: ``make_fx``), so that no value of a parameter or of the data can end up in the
record. Operations that do not depend on :math:`v` are the first stage, which *linearizes*, the
others the second, which *pushes* vectors through:

.. math:: r = \operatorname{linearize}(\theta, x), \qquad q = \operatorname{push}(v, r).

With :math:`r` kept between products a Hessian product pays for the second stage alone, 2 gradients'
work, and a GGN product 4/3, since what the record shows to be unused is left out.

What is recorded is plain double backward, which is right where ``torch.func``'s derivatives are
silently wrong (docs/decisions/0001); several vectors go through ``push`` by ``vmap`` of a function
that is differentiated no further.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functionalize, vmap
from torch.fx.experimental.proxy_tensor import make_fx

_COPY = torch.ops.aten.copy_.default
_VIEW = torch.ops.aten.view.default
_CLONE = torch.ops.aten.clone.default


@dataclass(frozen=True)
class Capture:
    """The two stages of a product.

    Attributes:
        linearize: Maps ``(*inputs, *held)`` to the tensors that ``push`` needs.
        push: Maps ``(vector, *linearized)`` to a tuple of the product.
        held: Tensors, neither parameters nor buffers nor data, that the model uses.
        draws: Whether ``linearize`` draws random numbers, from torch's global generator.
        writes: Whether ``linearize`` writes into its inputs (into buffers).
    """

    linearize: fx.GraphModule
    push: fx.GraphModule
    held: tuple[Tensor, ...]
    draws: bool
    writes: bool


def captured(function: Callable[..., Tensor], inputs: Sequence[Tensor], vector: Tensor) -> Capture:
    """Records a function that is linear in its last argument.

    Args:
        function: Of ``(*inputs, vector)``.
        inputs: Examples of the inputs; their values are not read.
        vector: An example of the vector.

    Raises:
        Exception: Of many kinds, if the function reads values (control flow that depends on data,
            ``.item()``, NumPy), or has operations that cannot be recorded.

    Example:
        >>> x, v = torch.tensor([2.0, 3.0]), torch.tensor([1.0, 10.0])
        >>> found = captured(lambda x, v: x.exp() * v, [x], v)
        >>> (kept,) = found.linearize(x)
        >>> bool((found.push(v, kept)[0] == x.exp() * v).all())
        True
    """
    examples = [*inputs, vector]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph, constants = _lifted(_recorded(function, examples), len(inputs))
        if any(_in_place(node) for node in graph.graph.nodes):
            graph = _recorded(functionalize(graph), [*inputs, *constants, vector])
    graph.graph.eliminate_dead_code(lambda node: node.is_impure() or _random(node))
    for node in graph.graph.nodes:
        if _depends_on_values(node.meta.get("val")):
            raise RuntimeError(f"numbers, or shapes, are read from tensors ({node.name})")
    linearize, push = _stages(graph.graph)
    targets = [node.target for node in linearize.graph.nodes]
    return Capture(
        linearize,
        push,
        constants,
        draws=any(_random(node) for node in linearize.graph.nodes),
        writes=_COPY in targets,
    )


def widened(push: fx.GraphModule, rows: Tensor, linearized: Sequence[Tensor]) -> fx.GraphModule:
    """The second stage for several vectors at once, ``[K, P]`` to ``[K, P]``.

    Args:
        push: The stage for one vector.
        rows: An example of the vectors.
        linearized: An example of what the first stage returns.
    """
    flexible = fx.GraphModule({}, copy.deepcopy(push.graph))
    for node in flexible.graph.nodes:
        if node.target is _VIEW:  # another axis may make a view impossible
            node.target = torch.ops.aten.reshape.default
    flexible.recompile()
    batched = vmap(flexible, in_dims=(0, *(None for _ in linearized)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = _recorded(batched, [rows, *linearized])
    out.graph.eliminate_dead_code()
    out.recompile()
    return out


@contextmanager
def recordable(model: nn.Module) -> Iterator[None]:
    """Calls what ``torch.compile`` wrapped, which is not recorded in its wrapper.

    At the end attributes of modules are put back, also those that a recorded forward pass left on
    them: fake tensors, counts of calls.
    """
    before = [(m, dict(vars(m))) for m in model.modules()]
    try:
        for module, _ in before:
            vars(module)["_compiled_call_impl"] = None
            if "_orig_mod" in module._modules:
                vars(module)["forward"] = module._modules["_orig_mod"]
        yield
    finally:
        for module, attributes in before:
            for name in vars(module).keys() - attributes.keys():
                del vars(module)[name]
            vars(module).update(attributes)


def _recorded(function: Callable[..., Any], examples: Sequence[Tensor]) -> fx.GraphModule:
    record = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)
    with torch.autograd.set_multithreading_enabled(False):  # modes do not follow to other threads
        return record(*examples)


def _lifted(module: fx.GraphModule, place: int) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    """Makes inputs of tensors that the graph holds, so that their values are read at each call.

    Args:
        module: The graph.
        place: At which place among the inputs the new ones come.
    """
    graph = module.graph
    constants: list[Tensor] = []
    made: dict[Any, fx.Node] = {}
    following = [node for node in graph.nodes if node.op == "placeholder"][place]
    for node in list(graph.nodes):
        if node.op != "get_attr":
            continue
        if node.target not in made:
            with graph.inserting_before(following):
                made[node.target] = graph.placeholder(f"constant_{len(constants)}")
            constants.append(getattr(module, node.target))
        node.replace_all_uses_with(made[node.target])
        graph.erase_node(node)
    return fx.GraphModule(module, graph), tuple(constants)


def _random(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags


def _depends_on_values(value: Any) -> bool:
    symbols = (torch.SymInt, torch.SymFloat, torch.SymBool)
    sizes = value.shape if isinstance(value, Tensor) else [value]
    return any(isinstance(size, symbols) for size in sizes)


def _in_place(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _stages(graph: fx.Graph) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Splits a graph without in-place operations by whether nodes depend on the last input.

    Views, and tensors that depend on nothing, are made again in the second stage rather than kept.
    """
    nodes = list(graph.nodes)
    vector = [node for node in nodes if node.op == "placeholder"][-1]
    dependent: set[fx.Node] = {vector}
    fixed: set[fx.Node] = set()
    for node in nodes:
        if any(a in dependent for a in node.all_input_nodes) and node.target is not _COPY:
            dependent.add(node)
        elif (
            node.op == "call_function" and not _random(node) and fixed >= set(node.all_input_nodes)
        ):
            fixed.add(node)
    written = {node.args[0] for node in nodes if node.target is _COPY}

    kept: list[fx.Node] = []
    second: list[fx.Node] = []
    seen = set()

    def visit(node: fx.Node) -> None:
        if node in seen:
            return
        seen.add(node)
        if node not in dependent and node not in fixed and not _is_view(node):
            kept.append(node)
            return
        for argument in node.all_input_nodes:
            visit(argument)
        if node is not vector:
            second.append(node)

    for node in nodes:
        if node in dependent:
            visit(node)

    first_graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    before: dict[fx.Node, fx.Node] = {}  # inputs' values before they are written into
    for node in nodes:
        if node not in dependent and node.op != "output":
            copies[node] = first_graph.node_copy(node, copies.__getitem__)
            if node in written and node in kept:
                before[node] = first_graph.call_function(_CLONE, (copies[node],))
    first_graph.output(tuple(before.get(node, copies[node]) for node in kept))
    linearize = fx.GraphModule({}, first_graph)
    linearize.graph.eliminate_dead_code(lambda node: node.is_impure() or _random(node))
    linearize.recompile()

    second_graph, copies = fx.Graph(), {}
    copies[vector] = second_graph.placeholder("vector")
    for i, node in enumerate(kept):
        copies[node] = second_graph.placeholder(f"kept_{i}")
    for node in second:
        if node.op != "output":
            copies[node] = second_graph.node_copy(node, copies.__getitem__)
    (product,) = graph.output_node().all_input_nodes
    second_graph.output((copies[product],))
    return linearize, fx.GraphModule({}, second_graph)


def _is_view(node: fx.Node) -> bool:
    return node.op == "call_function" and bool(getattr(node.target, "is_view", False))
