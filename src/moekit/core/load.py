"""Opening a model: `babel`, a local directory or a hub id, checked before the weights are read.

transformers is imported inside the functions: a mistyped path is then reported at once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moekit.core.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from moekit.core.spec import MoESpec

BABEL = "babel"
PACKED_FILE = "packed.json"
FACTORED_FILE = "factored.json"
BABEL_PATH = Path(__file__).parents[1] / BABEL
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


@dataclass
class LanguageModel:
    """A model in evaluation mode and its tokenizer (None if it has none)."""

    model: PreTrainedModel
    tokenizer: Any


@dataclass
class LoadedModel(LanguageModel):
    """A MoE model with its spec."""

    spec: MoESpec


def load(path: str | Path, dtype: str | torch.dtype | None = None, **options: Any) -> LoadedModel:
    """Load `babel`, a local directory or a hub id; `dtype` None keeps the stored number format.

    `options` go to `from_pretrained`. Only classes of transformers and of moekit are used, and
    only safetensors are read. Raises UserError where there is no model, for a dense model, an
    unknown family, a damaged or incomplete checkpoint, and a hub that cannot be reached.
    """
    from moekit.core.architecture import read_config
    from moekit.core.spec import MoESpec

    source = resolve_model(path)
    # From the hub the config alone at first: a dense model is refused before its download.
    spec = MoESpec.from_config(read_config(find_config(source)))
    loaded = load_language_model(source, dtype, **options)
    return LoadedModel(loaded.model, loaded.tokenizer, spec)


def load_language_model(
    path: str | Path, dtype: str | torch.dtype | None = None, **options: Any
) -> LanguageModel:
    """As `load`, for dense models and ensembles too."""
    from moekit.core.architecture import architecture_of, read_config
    from moekit.core.checkpoint import Checkpoint

    source = resolve_model(path)
    config = read_config(find_config(source))
    directory = find_model(source)
    if (directory / PACKED_FILE).is_file():
        raise UserError(
            f"{directory} is packed: `moekit.open_engine` and `moekit run` run it, "
            "`moekit.runtime.unpack.load_packed` decodes it"
        )
    if (directory / FACTORED_FILE).is_file():
        raise UserError(
            f"{directory} holds factors: the verbs of moekit load it, and "
            "`moekit.compress.factorize.store.load_factored`"
        )
    Checkpoint(directory).close()
    model = _load_weights(architecture_of(config), directory, dtype, options)
    return LanguageModel(model, load_tokenizer(directory))


def load_model(
    source: str | Path, dtype: str | torch.dtype | None = None, **options: Any
) -> tuple[PreTrainedModel, Any]:
    """Model and tokenizer of `load`."""
    loaded = load(source, dtype, **options)
    return loaded.model, loaded.tokenizer


def resolve_model(source: str | Path) -> Path | str:
    """The directory of a local model or of `babel`, or a hub id as it is.

    Raises UserError for what is neither.
    """
    name = str(source)
    if name == BABEL:
        if not BABEL_PATH.is_dir():
            raise UserError(f"babel is missing from this installation: {BABEL_PATH} does not exist")
        return BABEL_PATH
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise UserError(f"{name} is a file: give the directory of the model, with its config.json")
    if HUB_ID.fullmatch(name) and not path.parent.is_dir():
        return name
    raise UserError(
        f"{name}: no such directory; MODEL is a local directory, a hub id (owner/name) or babel"
    )


def find_config(source: str | Path) -> Path:
    """The directory of a model or its `config.json` file; from the hub only that file is read.

    Raises UserError where there is neither, or the hub cannot be reached.
    """
    if Path(source).expanduser().is_file():
        return Path(source).expanduser()
    found = resolve_model(source)
    return _hub_config(found) if isinstance(found, str) else found


def find_model(source: str | Path) -> Path:
    """The directory of a model's files; a model of the hub is downloaded. Raises as `load`."""
    found = resolve_model(source)
    return _hub_snapshot(found) if isinstance(found, str) else found


def local_directory(source: str | Path) -> Path:
    """The directory of a model on this machine; a model from the hub is downloaded.

    Raises UserError where there is no such model, or the hub cannot be reached.
    """
    found = resolve_model(source)
    return _hub_snapshot(found) if isinstance(found, str) else found


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer in a model's directory, or None where there is none."""
    from transformers import AutoTokenizer

    from moekit.core.checkpoint import read_json

    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        return None
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            read_json(directory / name)
    try:
        return AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise UserError(f"the tokenizer in {directory} cannot be loaded: {error}") from error


def _load_weights(
    model_class: type[PreTrainedModel],
    directory: Path,
    dtype: str | torch.dtype | None,
    options: dict[str, Any],
) -> PreTrainedModel:
    loaded: Any = model_class.from_pretrained(
        directory,
        dtype="auto" if dtype is None else dtype,
        use_safetensors=True,
        output_loading_info=True,
        # Reported below, with names: transformers itself only points to its log.
        ignore_mismatched_sizes=True,
        **options,
    )
    model, report = loaded
    problems = [f"{name} is missing" for name in sorted(report["missing_keys"])]
    problems += [
        f"{name} has shape {list(stored)}, the config says {list(expected)}"
        for name, stored, expected in sorted(report["mismatched_keys"])
    ]
    if problems:
        # transformers would go on with random values in their place.
        raise UserError(
            f"{directory}: {len(problems)} tensors do not fit the config "
            f"({model_class.__name__}): {problems[0]}"
        )
    return model


def _hub_config(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    try:
        return Path(hf_hub_download(name, "config.json"))
    except (EntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise _unreachable(name, error) from error


def _hub_snapshot(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except (EntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise _unreachable(name, error) from error


def _unreachable(name: str, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return UserError(
        f"{name} is neither a local directory nor could it be read from the hub: {reason}"
    )
