"""Golden files of merging by authors' and FusionBench's functions, for tests/merge/test_peers.py.

    python benchmarks/merge_peers.py --fusion-bench DIR --pcb FILE --widen DIR

DIR is an unpacked wheel of fusion-bench (0.2.33 made the file), FILE `pcb-merging.py` of
duguodong7/pcb-merging, the other DIR a checkout of yule-BUAA/MergeLLM. Their functions are run,
none of their code is kept. Inputs are the models of `tests/merge/golden/llama-float32`; what else a
function takes is drawn as `moments` and `information` say.
"""

from __future__ import annotations

import argparse
import ast
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

GOLDEN = Path(__file__).parents[1] / "tests" / "merge" / "golden"
MODELS = ("a", "b", "c")
OFF_DIAGONAL = 0.9


def functions(path: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """Functions of a file by name, without importing what else it imports."""
    tree = ast.parse(path.read_text())
    tree.body = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in names]
    space: dict[str, Any] = {"torch": torch, "Tensor": Tensor, "nn": nn}
    space |= {"List": list, "Dict": dict, "Optional": Any, "StateDictType": dict}
    for node in tree.body:
        assert isinstance(node, ast.FunctionDef)
        # Annotations name types of modules that are not imported here.
        node.returns = None
        for argument in [*node.args.args, *node.args.kwonlyargs]:
            argument.annotation = None
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    exec(compile(ast.fix_missing_locations(tree), str(path), "exec"), space)
    return space


def information(name: str, shape: tuple[int, ...], model: int) -> Tensor:
    """Fisher information of a tensor, drawn by its name."""
    draw = torch.Generator().manual_seed(sum(name.encode()) + 1000 * model)
    return torch.rand(shape, generator=draw) + 0.01


def moments(name: str, width: int, model: int) -> Tensor:
    """Second moments of the inputs of a tensor, drawn by its name."""
    draw = torch.Generator().manual_seed(sum(name.encode()) + 2000 * model)
    inputs = torch.randn(4 * width, width, generator=draw)
    return inputs.T @ inputs / len(inputs)


def flat(deltas: list[dict[str, Tensor]]) -> Tensor:
    """Task vectors as rows, tensors by name."""
    return torch.stack([torch.cat([d[name].flatten() for name in sorted(d)]) for d in deltas])


def unflat(row: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = row.split([like[name].numel() for name in sorted(like)])
    return {n: part.view(like[n].shape) for n, part in zip(sorted(like), parts, strict=True)}


def widen(
    directory: Path, base: dict[str, Tensor], tuned: list[dict[str, Tensor]]
) -> dict[str, Tensor]:
    """WIDEN by its authors' class, on modules that have the names it asks for."""
    sys.path.insert(0, str(directory))
    for name, content in {
        "utils": {},
        "utils.utils": {
            "get_param_names_to_merge": lambda input_param_names, **_: input_param_names
        },
        "model_merging_methods.mask_weights_utils": {"mask_model_weights": None},
    }.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(content)
    from model_merging_methods.merging_methods import MergingMethod

    models = [module_of(state) for state in (base, *tuned)]
    return MergingMethod("widen_merging").widen_merging(models[0], models[1:], [])


def module_of(state: dict[str, Tensor]) -> nn.Module:
    """A module tree with linear layers, an embedding and norms of these names."""
    root = nn.Module()
    for name, tensor in state.items():
        *path, leaf, last = name.split(".")
        here = root
        for part in path:
            if not hasattr(here, part):
                here.add_module(part, nn.Module())
            here = getattr(here, part)
        kind: Callable[..., nn.Module] = nn.Embedding if "embed" in leaf else nn.Linear
        if tensor.ndim == 1:
            child: nn.Module = nn.Module()
        else:
            rows, columns = tensor.shape
            child = kind(rows, columns) if kind is nn.Embedding else nn.Linear(columns, rows, False)
        child.register_parameter(last, nn.Parameter(tensor.clone()))
        here.add_module(leaf, child)
    return root


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fusion-bench", type=Path, required=True)
    parser.add_argument("--pcb", type=Path, required=True)
    parser.add_argument("--widen", type=Path, required=True)
    arguments = parser.parse_args()
    bench = arguments.fusion_bench / "fusion_bench" / "method"
    stored = load_file(GOLDEN / "llama-float32.safetensors")
    states = {
        model: {
            name.split("/", 2)[2]: tensor
            for name, tensor in stored.items()
            if name.startswith(f"in/{model}/")
        }
        for model in ("base", *MODELS)
    }
    base, tuned = states["base"], [states[model] for model in MODELS]
    deltas = [{name: one[name] - base[name] for name in base} for one in tuned]
    found: dict[str, dict[str, Tensor]] = {}

    names = ("ties_merging", "topk_values_mask", "resolve_sign", "resolve_zero_signs")
    ties = functions(bench / "ties_merging" / "ties_merging_utils.py", (*names, "disjoint_merge"))[
        "ties_merging"
    ]
    found["ties"] = unflat(ties(flat(deltas), 20, "mean"), base)

    tsv = functions(
        bench / "task_singular_vector" / "utils" / "TSVM_utils.py",
        ("compute_and_sum_svd_mem_reduction",),
    )["compute_and_sum_svd_mem_reduction"]
    found["tsv_m"] = tsv(deltas, accelerator="cpu")

    lists = {name: [one[name] for one in tuned] for name in base}
    fisher = functions(
        bench / "fisher_merging" / "fisher_merging.py",
        ("get_models_fisher_norm", "merging_with_fisher_weights"),
    )["merging_with_fisher_weights"]
    informed = [
        {name: information(name, tuple(base[name].shape), i) for name in base} for i in range(3)
    ]
    found["fisher"] = fisher(lists, informed, torch.ones(3))

    regmean = functions(
        bench / "regmean" / "regmean.py",
        ("reduce_non_diagonal_elements", "merging_with_regmean_weights"),
    )["merging_with_regmean_weights"]
    linear = [name for name in base if base[name].ndim == 2 and "embed" not in name]
    seen = [
        {name.removesuffix(".weight"): moments(name, base[name].shape[1], i) for name in linear}
        for i in range(3)
    ]
    found["regmean"] = regmean(lists, seen, OFF_DIAGONAL)

    pcb = functions(arguments.pcb, ("normalize", "clamp", "act", "PCB_merge"))["PCB_merge"]
    found["pcb"] = unflat(pcb(flat(deltas), 0.1)[0], base)
    found["widen"] = {n: t.detach() for n, t in widen(arguments.widen, base, tuned).items()}
    save_file(
        {f"{peer}/{n}": t.contiguous() for peer, made in found.items() for n, t in made.items()},
        GOLDEN.parent / "peers.safetensors",
    )


if __name__ == "__main__":
    main()
