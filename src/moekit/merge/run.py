"""`merge`: stream a recipe's result to a directory, tensor by tensor."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moekit.core.checkpoint import TensorInfo
from moekit.core.errors import UserError
from moekit.core.load import find_model
from moekit.core.model_card import CARD_FILE
from moekit.core.model_files import side_files
from moekit.core.record import start_record
from moekit.core.source_model import SourceModel
from moekit.core.write_model import fill, state_of
from moekit.core.writer import DEFAULT_SHARD_BYTES, CheckpointWriter, check_output
from moekit.merge.ahead import computed_ahead
from moekit.merge.align_experts import align_experts
from moekit.merge.plan import MergedTensor, plan_merge, reads_text, result_layers
from moekit.merge.preparation import NO_TEXT, Preparation, begin, prepare
from moekit.merge.recipe import MergeRecipe
from moekit.merge.search import searched
from moekit.merge.sources import MergeSources
from moekit.merge.vocabulary import Vocabulary, common_vocabulary, with_vocabulary

RECIPE_FILE = "moekit_merge.json"


@dataclass
class Merged:
    """What a merge wrote, or in a dry run would write; sizes in bytes."""

    out: Path
    tensors: int
    bytes: int
    source_bytes: int
    seconds: float = 0.0
    resumed_bytes: int = 0
    notes: list[str] = field(default_factory=list)


def merge(
    recipe: MergeRecipe,
    out: str | Path,
    *,
    seed: int = 0,
    names: Mapping[str, Path] | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    restart: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
    told: Callable[[str, int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> Merged:
    """Write the result of one recipe to directory `out`.

    `names` are results of earlier steps by name. `progress` counts bytes, `told` (what, done, all)
    the parts of what methods find out before. Memory: a few blocks of a tensor for the methods
    that work by entry, a few whole tensors of every model for the others. An interrupted merge
    continues when called again with the same arguments. Raises `UserError` for everything in the
    recipe, the models or the disk that stands in the way, before anything is written wherever that
    can be known before.
    """
    target = Path(out)
    check_output(target, overwrite)

    def find(name: str) -> Path:
        return names[name] if names and name in names else find_model(name)

    learns = reads_text(recipe)
    if learns and not any(recipe.files_of(model) for model in recipe.models):
        raise UserError(NO_TEXT.format(recipe.method or "the recipe"))
    if learns and recipe.tokenizer is not None:
        raise UserError(
            "methods that learn from text run the models as they are: put each on the common "
            "vocabulary in a step before, by linear with weight 1 for it and 0 for the others."
        )
    by_parameter = recipe.align is not None or recipe.tokenizer is not None
    by_parameter |= recipe.scope == "expert" or learns
    with MergeSources(recipe.models, find, by_parameter=by_parameter) as sources:
        vocabulary = None
        if recipe.tokenizer is not None:
            vocabulary = common_vocabulary(recipe, sources)
            with_vocabulary(sources, vocabulary)
        if recipe.align is not None and not dry_run:
            _align(recipe, sources, target.absolute().parent)
        tensors = plan_merge(recipe, sources, seed)
        donor = _donor(recipe, sources)
        identity = {
            "recipe": recipe_hash(recipe),
            "seed": seed,
            "files": {name: state_of(s.checkpoint) for name, s in sources.by_name.items()},
        }
        scratch = target.absolute().with_name(target.name + ".prepared")
        room = Preparation(recipe, sources, scratch, seed, told)
        prepares = bool(recipe.search) or any(t.method.prepare for t in tensors.values())
        if prepares and not dry_run:
            tensors = _prepared(tensors, room, identity, restart)
        result = Merged(
            target,
            len(tensors),
            sum(tensor.nbytes for tensor in tensors.values()),
            sum(source.checkpoint.nbytes for source in sources.by_name.values()),
        )
        if dry_run:
            return result
        record = start_record("merge", {"recipe": recipe_dict(recipe)}, seed=seed)
        writer = CheckpointWriter(
            target,
            {name: TensorInfo(t.shape, t.dtype) for name, t in tensors.items()},
            identity=identity,
            max_shard_bytes=max_shard_bytes,
            overwrite=overwrite,
            restart=restart,
        )
        # Aligned experts come one layer after the other from one place on disk.
        alone = recipe.align is not None
        with nullcontext(tensors) if alone else computed_ahead(tensors) as ahead:
            result.resumed_bytes = fill(
                writer,
                ahead,
                lambda _: _files(room, donor, tensors, vocabulary),
                record,
                [path for source in sources.by_name.values() for path in source.checkpoint.files],
                progress=progress,
                note=note,
            )
        result.seconds = record.seconds
    if prepares:
        shutil.rmtree(scratch)
    return result


def _prepared(
    tensors: dict[str, MergedTensor],
    room: Preparation,
    identity: Mapping[str, Any],
    restart: bool,
) -> dict[str, MergedTensor]:
    """The tensors after their search and what their methods find out first."""
    begin(room.scratch, identity, room.recipe, restart)
    tensors = searched(tensors, room) if room.recipe.search else tensors
    return prepare(tensors, room)


def recipe_dict(recipe: MergeRecipe) -> dict[str, Any]:
    """The recipe as plain data."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(recipe), default=dict))
    return plain


def recipe_hash(recipe: MergeRecipe) -> str:
    text = json.dumps(recipe_dict(recipe), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _donor(recipe: MergeRecipe, sources: MergeSources) -> SourceModel:
    """The model that config and tokenizer come from: the base, else the first that is named."""
    tokenizer = recipe.tokenizer
    if isinstance(tokenizer, str) and tokenizer in sources.by_name:
        return sources[tokenizer]
    return sources[recipe.reference]


def _align(recipe: MergeRecipe, sources: MergeSources, scratch: Path) -> None:
    reference = sources[recipe.reference]
    for name, source in sources.by_name.items():
        if source is not reference:
            sources.by_name[name] = align_experts(source, reference, scratch)


def _files(
    room: Preparation,
    donor: SourceModel,
    tensors: Mapping[str, MergedTensor],
    vocabulary: Vocabulary | None,
) -> dict[str, str | bytes]:
    """What lies beside the tensors, by name."""
    recipe = room.recipe
    copied, _ = side_files(donor.directory)
    files: dict[str, str | bytes] = {name: path.read_bytes() for name, path in copied.items()}
    config = merged_config(recipe, room.sources, donor, tensors)
    changes = dict(room.config)
    if vocabulary is not None:
        changes["vocab_size"] = vocabulary.size
        files |= vocabulary.files()
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            part.update({key: value for key, value in changes.items() if key in part})
    if recipe.chat_template is not None:
        files["chat_template.jinja"] = recipe.chat_template
    files["config.json"] = json.dumps(config, indent=2) + "\n"
    files[RECIPE_FILE] = json.dumps(recipe_dict(recipe), indent=2) + "\n"
    files[CARD_FILE] = model_card(recipe)
    return files | room.files


def merged_config(
    recipe: MergeRecipe,
    sources: MergeSources,
    donor: SourceModel,
    tensors: Mapping[str, MergedTensor],
) -> dict[str, Any]:
    """`config.json` of the result: the donor's, with the layers and the dtype that it has."""
    config: dict[str, Any] = copy.deepcopy(donor.raw)
    config.pop("quantization_config", None)
    layers = result_layers(recipe, sources)
    for part in (config, config.get("text_config")):
        if not isinstance(part, dict) or "num_hidden_layers" not in part:
            continue
        before = part["num_hidden_layers"]
        part["num_hidden_layers"] = len(layers)
        for key, value in part.items():
            # What is listed by layer, such as the kind of its attention, moves with it.
            if isinstance(value, list) and len(value) == before:
                part[key] = [value[layer] for layer in layers]
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    if len(dtypes) == 1:
        config.pop("torch_dtype", None)
        config["dtype"] = dtypes.pop()
    return config


def model_card(recipe: MergeRecipe) -> str:
    """A README that says what was merged and how."""

    import yaml

    given = recipe_dict(recipe).items()
    text = yaml.safe_dump({key: value for key, value in given if value}, sort_keys=False)
    models = "\n".join(f"- {model}" for model in recipe.models)
    method = recipe.method or "several methods"
    return (
        f"---\ntags: [merge, moekit]\n---\n# Merged by {method}\n\nMade by moekit from\n\n"
        f"{models}\n\nwith this recipe:\n\n```yaml\n{text}```\n"
    )


def _is_result(place: Path, recipe: MergeRecipe) -> bool:
    try:
        written = json.loads((place / RECIPE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(written == recipe_dict(recipe))


def run_recipe(recipes: list[MergeRecipe], out: str | Path, **options: Any) -> Merged:
    """Do the steps of a recipe in order; the last one's result is at `out`.

    Results of the steps before it lie in `out.steps/` until it is done. Options as for `merge`.
    """
    target = Path(out)
    if len(recipes) == 1:
        return merge(recipes[0], target, **options)
    check_output(target, bool(options.get("overwrite")))
    scratch = target.with_name(target.name + ".steps")
    names: dict[str, Path] = {}
    for recipe in recipes[:-1]:
        assert recipe.name is not None
        place = scratch / recipe.name
        names[recipe.name] = place
        if options.get("dry_run"):
            raise UserError("--dry-run knows one merge at a time; give the steps one by one.")
        if not _is_result(place, recipe):
            scratch.mkdir(parents=True, exist_ok=True)
            merge(recipe, place, names=names, **{**options, "overwrite": True})
    result = merge(recipes[-1], target, names=names, **options)
    shutil.rmtree(scratch)
    return result
