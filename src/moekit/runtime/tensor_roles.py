"""What the native decoder makes of each tensor of the resident part."""

from __future__ import annotations

from moekit.runtime.decoder_shape import DecoderShape

# A product's matrix, numbers in float32, rows that are read one by one, and a matrix that is taken
# apart by heads.
MATRIX, VECTOR, TABLE, HEADS = "matrix", "vector", "table", "heads"


def roles_of(shape: DecoderShape) -> dict[str, tuple[str, ...]]:
    """What becomes of each tensor of the resident part; a tied embedding has two roles."""
    roles: dict[str, tuple[str, ...]] = {}

    def add(name: str | None, role: str) -> None:
        if name is not None:
            roles[name] = (*roles.get(name, ()), role)

    def linear(path: str) -> None:
        add(f"{path}.weight", MATRIX)
        add(f"{path}.bias" if f"{path}.bias" in shape.tensors else None, VECTOR)

    add(shape.embedding, TABLE)
    add(shape.final_norm, VECTOR)
    add(shape.head, MATRIX)
    add(shape.head_bias, VECTOR)
    for layer in shape.layers:
        heads = (layer.q_norm, layer.k_norm, layer.q_a_norm, layer.kv_a_norm, layer.sinks)
        for name in (*layer.norms, *heads, layer.shared_gate):
            add(name, VECTOR)
        for part, path in layer.projections.items():
            if part == "k" and shape.kv_latent:
                add(f"{path}.weight", HEADS)
            else:
                linear(path)
        for path in layer.mlp or ():
            linear(path)
        if layer.router is not None:
            add(layer.router.weight, TABLE)
            add(layer.router.bias, VECTOR)
            add(layer.router.correction, VECTOR)
    return roles
