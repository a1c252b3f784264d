"""What is done to an ONNX graph before it is quantised; none of it changes what the graph computes.

Graphs are those of `onnx_ir`, with which PyTorch's exporter makes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from ..finding.evening import SMALL, Seen, even
from ..finding.rounding import rounded, rounded_weight

SCOPES = "pkg.torch.onnx.name_scopes"  # where PyTorch's exporter says which module a node comes from
NORM = "LayerNormalization"


def linears(graph: Any) -> Iterator[Any]:
    """The nodes that multiply by a weight, of a graph of `onnx_ir`."""
    for node in graph:
        if node.op_type in ("MatMul", "Gemm") and constant(node.inputs[1]) is not None:
            yield node


def constant(value: Any) -> np.ndarray | None:
    """What a value is, where that is fixed."""
    tensor = None if value is None else value.const_value
    return None if tensor is None else tensor.numpy()


def name_linears(graph: Any) -> list[str]:
    """Call every linear what its module is called in PyTorch, as in `encoder.layers.7.mlp.fc2`; their names."""
    names: dict[str, int] = {}
    for node in linears(graph):
        name = _module(node)
        names[name] = names.get(name, 0) + 1
        node.name = name if names[name] == 1 else f"{name}:{names[name]}"
    return [node.name for node in linears(graph)]


def _module(node: Any) -> str:
    scopes = node.metadata_props.get(SCOPES, "")
    parts = [part.strip(" '\"") for part in scopes.strip("[]").split(",")]
    return (parts[-2].removeprefix("inner.") if len(parts) > 1 else "") or node.name


def lift_rows(graph: Any) -> int:
    """Move constant rows in front of a sequence behind the linears that read them; how many linears that were.

    `[rows | tokens] W` is `[rows W | tokens W]`. So what attention's registers become is worked out in float, once, and
    a quantised input holds tokens alone.
    """
    import onnx_ir as ir

    lifted = 0
    for node in list(linears(graph)):
        join = node.inputs[0].producer()
        if node.op_type != "MatMul" or join is None or join.op_type != "Concat" or len(join.inputs) != 2:
            continue
        rows = _rows(join.inputs[0])
        if rows is None or rows.ndim != 3:
            continue
        weight, tokens = constant(node.inputs[1]), join.inputs[1]
        assert weight is not None
        value = ir.Value(name=f"{node.name}.rows", const_value=ir.tensor(rows @ weight, name=f"{node.name}.rows"))
        graph.register_initializer(value)
        one = _initializer(graph, f"{node.name}.one", np.array([1, 1], np.int64))
        batch = ir.node("Shape", [tokens], {"start": 0, "end": 1}, name=f"{node.name}.batch")
        shape = ir.node("Concat", [batch.outputs[0], one], {"axis": 0}, name=f"{node.name}.shape")
        first = ir.node("Expand", [value, shape.outputs[0]], name=f"{node.name}.expand")  # (batch, registers, out)
        product = ir.node("MatMul", [tokens, node.inputs[1]], name=node.name)
        product.metadata_props.update(node.metadata_props)
        product.outputs[0].type, product.outputs[0].dtype = node.outputs[0].type, node.outputs[0].dtype
        node.name = f"{node.name}.joined"
        joined = ir.node("Concat", [first.outputs[0], product.outputs[0]], {"axis": 1}, name=f"{node.name}.rows")
        old, new = node.outputs[0], joined.outputs[0]
        new.shape, new.type, new.dtype = old.shape, old.type, old.dtype
        for made in (batch, shape, first, product, joined):
            for index, output in enumerate(made.outputs):
                output.name = output.name or f"{made.name}_{index}"
        graph.insert_before(node, [batch, shape, first, product, joined])
        ir.convenience.replace_all_uses_with(old, new)
        graph.remove(node, safe=True)
        lifted += 1
    return lifted


def tidy(model: Any) -> None:
    """Leave out of an `onnx_ir` model what nothing reads, and what its exporter says of where each node comes from."""
    import onnx_ir as ir

    ir.passes.common.RemoveUnusedNodesPass()(model)
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()


def _initializer(graph: Any, name: str, array: np.ndarray) -> Any:
    import onnx_ir as ir

    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value


def _rows(value: Any) -> np.ndarray | None:
    """The constant behind `Expand`s `(1, rows, channels)`, None where there is none, or it depends on the images."""
    if (found := constant(value)) is not None:
        return found
    node = value.producer()
    if node is None or node.op_type != "Expand":
        return None
    rows = _rows(node.inputs[0])
    if rows is None:
        return None
    shape = value.shape
    count = shape[1] if shape is not None and len(shape) == 3 and isinstance(shape[1], int) else rows.shape[1]
    return np.broadcast_to(rows, (1, count, rows.shape[-1])) if rows.ndim == 3 else None


def even_out(graph: Any, seen: Mapping[str, Seen], *, per_channel: bool = True) -> list[str]:
    """Give what linears read sizes that one scale can hold; the linears whose tokens are divided too.

    Channels and tokens are divided as `testreg.finding.evening` says, and the weights are multiplied. A norm divides in
    its own gain and bias; in front of the other linears, those behind attention and activation, stands one
    multiplication.

    Args:
        seen: value that linears read -> what calibration images have there.
        per_channel: weights will have a scale for each output channel.
    """
    divided: list[str] = []
    for value, readers in inputs(graph).items():
        if value.name not in seen:
            continue
        weights = [_weight(reader) for reader in readers]  # each (channels, outputs)
        found = even(
            seen[value.name],
            torch.from_numpy(np.concatenate(weights, 1).T),
            partial(rounded, bits=8),
            partial(rounded_weight, bits=8, axis=0 if per_channel else None),
            divide=_divisible(value, readers),
        )
        scale = found.scale.numpy()
        if not _divide_norm(graph, value, readers, scale):
            _divide(graph, value, readers, scale)
        for reader, weight in zip(readers, weights, strict=True):
            changed = weight * scale[:, None]
            changed = changed.T.copy() if _turned(reader) else changed
            reader.replace_input_with(1, _initializer(graph, f"{reader.name}.even", changed))
        if found.alike:
            _divide_tokens(graph, readers)
            divided += [reader.name for reader in readers]
    return divided


def _divisible(value: Any, readers: list[Any]) -> bool:
    """Whether what linears read is of tokens that may differ in size; a Gemm would multiply its bias too."""
    return value.producer().op_type not in (NORM, "Concat") and all(reader.op_type == "MatMul" for reader in readers)


def inputs(graph: Any) -> dict[Any, list[Any]]:
    """What linears read -> the linears that read it."""
    found: dict[Any, list[Any]] = {}
    for node in linears(graph):
        if (
            node.inputs[0] is not None
            and node.inputs[0].producer() is not None
            and not node.attributes.get_int("transA", 0)
        ):
            found.setdefault(node.inputs[0], []).append(node)
    return found


def _divide_norm(graph: Any, value: Any, readers: list[Any], scale: np.ndarray) -> bool:
    """Divide a norm's channels by `scale`, where it is a norm, and nobody else reads it; whether that was so."""
    node, read = value.producer(), [user for user, _ in value.uses() if user.op_type != "Shape"]
    if node.op_type != NORM or value.is_graph_output() or len(read) != len(readers) or constant(node.inputs[1]) is None:
        return False
    for index in range(1, len(node.inputs)):  # gain and bias
        if (old := constant(node.inputs[index])) is not None:
            node.replace_input_with(index, _initializer(graph, f"{node.name}.even.{index}", old / scale))
    return True


def _divide(graph: Any, value: Any, readers: list[Any], scale: np.ndarray) -> None:
    import onnx_ir as ir

    name = f"{readers[0].name}.evened"
    node = ir.node("Mul", [value, _initializer(graph, f"{name}.by", 1 / scale)], name=name)
    made = node.outputs[0]
    made.name, made.type, made.dtype, made.shape = name, value.type, value.dtype, value.shape
    graph.insert_after(value.producer(), node)
    for reader in readers:
        reader.replace_input_with(0, made)


def _divide_tokens(graph: Any, readers: list[Any]) -> None:
    """Divide every token in front of linears by its largest magnitude, and multiply their products by it again.

    So one scale holds tokens of any size, as dynamic ranges per token do, with operators that every engine has.
    """
    import onnx_ir as ir

    read, name = readers[0].inputs[0], f"{readers[0].name}.size"
    axis, least = _initializer(graph, f"{name}.axis", np.array([-1], np.int64)), np.array([SMALL], np.float32)
    size = ir.node("Abs", [read], name=f"{name}.abs")
    most = ir.node("ReduceMax", [size.outputs[0], axis], {"keepdims": 1}, name=f"{name}.max")  # (batch, tokens, 1)
    some = ir.node("Max", [most.outputs[0], _initializer(graph, f"{name}.least", least)], name=f"{name}.some")
    alike = ir.node("Div", [read, some.outputs[0]], name=f"{name}.alike")
    graph.insert_after(read.producer(), [size, most, some, alike])
    made = [size, most, some, alike]
    for reader in readers:
        product = reader.outputs[0]
        again = ir.node("Mul", [product, some.outputs[0]], name=f"{reader.name}.again")
        again.outputs[0].shape = product.shape
        ir.convenience.replace_all_uses_with(product, again.outputs[0])
        again.replace_input_with(0, product)
        graph.insert_after(reader, again)
        reader.replace_input_with(0, alike.outputs[0])
        made.append(again)
    for node in made:
        node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].type = f"{node.name}.0", read.dtype, read.type
    alike.outputs[0].shape = read.shape


def _weight(node: Any) -> np.ndarray:
    """A linear's weight `(channels, outputs)`."""
    weight = constant(node.inputs[1])
    assert weight is not None
    return weight.T if _turned(node) else weight


def _turned(node: Any) -> bool:
    return bool(node.op_type == "Gemm" and node.attributes.get_int("transB", 0))
