"""What is done to an ONNX graph before it is quantised; none of it changes what the graph computes.

Graphs are those of `onnx_ir`, with which PyTorch's exporter makes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

SCOPES = "pkg.torch.onnx.name_scopes"  # where PyTorch's exporter says which module a node comes from
EVEN = "LayerNormalization"


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


def even_out(graph: Any, largest: Mapping[str, np.ndarray]) -> int:
    """Give the channels between a norm and its linears sizes that one scale can hold; how many norms that were.

    Each channel is divided by the root of its largest value over that of the weights that read it (SmoothQuant,
    arXiv 2211.10438, equation 4 with alpha 0.5): in the norm's own gain and bias, and back in the weights.

    Args:
        largest: output of a norm -> its channels' largest magnitude `(channels,)`, as calibration images have it.
    """
    evened = 0
    for node in graph:
        readers = _readers(node) if node.op_type == EVEN and node.outputs[0].name in largest else []
        gain, weights = constant(node.inputs[1]) if readers else None, [constant(r.inputs[1]) for r in readers]
        if gain is None or any(weight is None for weight in weights):
            continue
        seen = largest[node.outputs[0].name]
        read = np.max([np.abs(weight).max(1) for weight in weights if weight is not None], axis=0)  # (channels,)
        scale = np.sqrt(np.maximum(seen, 1e-5) / np.maximum(read, 1e-5)).astype(gain.dtype)
        for index in range(1, len(node.inputs)):
            if (old := constant(node.inputs[index])) is not None:
                node.replace_input_with(index, _initializer(graph, f"{node.name}.even.{index}", old / scale))
        for reader, weight in zip(readers, weights, strict=True):
            assert weight is not None
            changed = _initializer(graph, f"{reader.name}.even", weight * scale[:, None])
            reader.replace_input_with(1, changed)
        evened += 1
    return evened


def norms(graph: Any) -> list[str]:
    """The outputs of norms that only linears read, whose channels can be evened out."""
    return [node.outputs[0].name for node in graph if node.op_type == EVEN and _readers(node)]


def _readers(node: Any) -> list[Any]:
    """The linears that read a node's output `(..., channels)`, none where anything else does."""
    output, readers = node.outputs[0], []
    if output.is_graph_output():
        return []
    for user, index in output.uses():
        if user.op_type == "Shape":
            continue
        plain = user.op_type == "MatMul" or (user.op_type == "Gemm" and not _turned(user))
        if index != 0 or not plain or constant(user.inputs[1]) is None:
            return []
        readers.append(user)
    return readers


def _turned(node: Any) -> bool:
    return any(node.attributes.get_int(name, 0) for name in ("transA", "transB"))
