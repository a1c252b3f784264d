"""What a patched checkpoint says about itself, and whether it can be believed.

`config.json` of a patched checkpoint has a `model_type` of its own, the unpatched model's config under `base_config`,
and the recipe under `testreg`: which class was saved, where its weights lie, and the SHA-256 of every file that decides
what the model computes. This file is part of every checkpoint, so that one loads without the package.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .errors import BadCheckpoint

MODEL_TYPE = "testreg"
FORMAT = 1
PLAN = "registers.safetensors"
HOW = (
    "testreg.load(PATH) (pip install testreg), or AutoModel.from_pretrained(PATH, trust_remote_code=True) with the "
    "Auto class of the task"
)
# Stock classes print the value of `transformers_weights` where it names no safetensors file, and stop.
NOT_WITHOUT_REGISTERS = f"none, because this model has test-time registers that a stock class would lose. Use {HOW}"

LARGEST_JSON = 64 * 2**20  # bytes
LARGEST_PLAN = 64 * 2**20
MOST_FILES = 10_000
FILE = re.compile(r"[A-Za-z0-9_][\w.-]{0,200}\.(safetensors|json)")
DTYPES = ("float64", "float32", "float16", "bfloat16")
DIGEST = re.compile(r"[0-9a-f]{64}")
# Files that `from_pretrained` would read beside the weights, or instead of them.
INTRUDER = re.compile(r"adapter_config\.json|shard-\d{5}-model-.*\.safetensors")
# Settings in a config that fetch or run something else than the class that is named.
FOREIGN = {"auto_map", "quantization_config", "fusion_config", "kernel_config", "attn_implementation"}
# What a config holds that decides nothing.
NAMES = {"id2label", "label2id", "label_names", "architectures", "_name_or_path", "transformers_version"}
# Settings that make a constructor loop, and the most of them that make sense.
BLOCKS, MOST_BLOCKS = re.compile(r"(^|_)(layers?|depths?|blocks?|stages?)$"), 10_000
LABELS, MOST_LABELS = re.compile(r"num_(labels|classes)$"), 2**20


@dataclass(frozen=True)
class Recipe:
    """Everything about a patched checkpoint that is not in its weights or its plan.

    Args:
        architecture: name of the transformers class that was saved.
        weights: the safetensors file with the weights, or the index of its shards.
        files: file name -> SHA-256, of the weights and the plan.
        base_config: the unpatched model's config, as in its own `config.json`.
        config: the SHA-256 of that, see `config_sha256`.
        base: where the model comes from: name and fingerprint.
        init: keyword arguments of the class that its config does not hold.
        attention: the attention implementation that the model ran with, so that outputs are the same bit for bit.
        versions: of the packages that wrote it.
        dtypes: weight -> its dtype, where they are of several; else none.

    Raises:
        BadCheckpoint: a value is of the wrong type or out of range.
    """

    architecture: str
    weights: str
    files: Mapping[str, str]
    base_config: Mapping[str, Any]
    config: str
    base: Mapping[str, Any] = field(default_factory=dict)
    init: Mapping[str, bool] = field(default_factory=dict)
    attention: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    dtypes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _expect(isinstance(self.architecture, str) and self.architecture.isidentifier(), "class", self.architecture)
        for name in ("files", "base_config", "base", "init", "versions", "dtypes"):
            _expect(isinstance(getattr(self, name), Mapping), name, getattr(self, name))
        _expect(
            isinstance(self.config, str) and bool(DIGEST.fullmatch(self.config)), "SHA-256 of the config", self.config
        )
        _expect(0 < len(self.files) <= MOST_FILES, "number of files", len(self.files))
        for file, digest in self.files.items():
            _expect(isinstance(file, str) and bool(FILE.fullmatch(file)) and ".." not in file, "file name", file)
            _expect(isinstance(digest, str) and bool(DIGEST.fullmatch(digest)), f"SHA-256 of {file}", digest)
        _expect(isinstance(self.weights, str) and self.weights in self.files, "weights", self.weights)
        _expect(PLAN in self.files, "files (the plan is not among them)", list(self.files))
        _expect(set(self.init) <= {"add_pooling_layer"} and set(self.init.values()) <= {False}, "init", self.init)
        for name, dtype in self.dtypes.items():
            _expect(isinstance(name, str) and dtype in DTYPES, f"dtype of {name}", dtype)
        _expect(self.attention in (None, "eager", "sdpa"), "attention", self.attention)
        model_type = self.base_config.get("model_type")
        _expect(isinstance(model_type, str) and model_type != MODEL_TYPE, "base model type", model_type)
        for key, value in _walk(self.base_config):
            _expect(key not in FOREIGN, f"base_config (it sets {key!r})", "a setting that no saved model needs")
            for pattern, most in ((BLOCKS, MOST_BLOCKS), (LABELS, MOST_LABELS)):
                _expect(not pattern.search(str(key)) or _largest(value) <= most, f"base_config ({key})", value)

    @classmethod
    def read(cls, directory: str | Path) -> Recipe:
        """The recipe of the checkpoint in `directory`; the files that it names are not looked at, see `verify`."""
        return cls.from_config(read_json(Path(directory) / "config.json"), directory)

    @classmethod
    def from_config(cls, values: Mapping[str, Any], where: str | Path = "the checkpoint") -> Recipe:
        """The recipe in the values of a `config.json`.

        Raises:
            BadCheckpoint: it is no patched checkpoint, of an unknown version, or damaged.
        """
        if not isinstance(values, Mapping) or values.get("model_type") != MODEL_TYPE:
            raise BadCheckpoint(
                f"{where} is no checkpoint with registers (testreg.save writes one); an ordinary checkpoint is loaded "
                f"with transformers and then patched."
            )
        recipe = values.get("testreg")
        version = recipe.get("format") if isinstance(recipe, Mapping) else None
        if not isinstance(recipe, Mapping) or isinstance(version, bool) or version != FORMAT:
            raise BadCheckpoint(
                f"{where} is a checkpoint of format {version!r}; this testreg reads format {FORMAT}: "
                f"pip install -U testreg."
            )
        fields = {key: value for key, value in recipe.items() if key != "format"}
        try:
            base_config = dict(values["base_config"])
            base_config.pop("transformers_weights", None)
            return cls(**fields, base_config=base_config)
        except (KeyError, TypeError, ValueError) as error:
            raise BadCheckpoint(f"{where} has a damaged recipe: {error}.") from error
        except RecursionError as error:
            raise BadCheckpoint(f"{where} has a damaged recipe: it is nested too deep.") from error

    def to_config(self) -> dict[str, Any]:
        """The values of `config.json`; stock classes stop at `transformers_weights` and print it."""
        recipe = {key: value for key, value in asdict(self).items() if key != "dtypes" or value}
        base_config = {**recipe.pop("base_config"), "transformers_weights": NOT_WITHOUT_REGISTERS}
        return {
            "model_type": MODEL_TYPE,
            "transformers_weights": NOT_WITHOUT_REGISTERS,
            "base_config": base_config,
            "testreg": {"format": FORMAT, **recipe},
        }

    def verify(self, directory: str | Path) -> int:
        """Whether `directory` holds what the recipe says, byte for byte.

        Returns:
            How many numbers the weights hold.

        Raises:
            BadCheckpoint: a file is missing, damaged or another one; the config was changed, or asks for more blocks
                than there are tensors; the index leads elsewhere.
        """
        directory = Path(directory)
        if self.config != config_sha256(self.base_config):
            raise BadCheckpoint(
                f"{directory / 'config.json'} is not what was saved: a setting under base_config was changed, so "
                f"the model would be another one. Copy it again, or give settings to testreg.load(PATH, NAME=VALUE)."
            )
        for name in sorted(entry.name for entry in directory.iterdir()):
            if INTRUDER.fullmatch(name):
                raise BadCheckpoint(f"{directory} holds {name}, which testreg does not write: move it away.")
        for name, digest in self.files.items():
            path = directory / name
            if not path.is_file():
                raise BadCheckpoint(f"{directory} lacks {name}: download or copy it again.")
            if name == PLAN and path.stat().st_size > LARGEST_PLAN:
                raise BadCheckpoint(f"{path} is too large for a register plan.")
            if sha256(path) != digest:
                raise BadCheckpoint(
                    f"{path} is not the file that was saved (its SHA-256 differs from the recorded one): it is "
                    f"damaged, cut short or swapped. Download or copy the checkpoint again."
                )
        shapes = [shape for name in self._shards(directory) for shape in _shapes(directory / name)]
        for key, value in _walk(self.base_config):
            if BLOCKS.search(str(key)):
                _expect(_largest(value) <= len(shapes), f"base_config ({key}, for {len(shapes)} tensors)", value)
        return sum(shapes)

    def _shards(self, directory: Path) -> list[str]:
        if not self.weights.endswith(".json"):
            return [self.weights]
        index = read_json(directory / self.weights)
        names = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(names, dict) or not all(
            isinstance(name, str) and name in self.files for name in names.values()
        ):
            raise BadCheckpoint(f"{directory / self.weights} leads to files that the checkpoint does not list.")
        return sorted(set(names.values()))


def read_json(path: Path) -> Any:
    """The values of a JSON file of sane size.

    Raises:
        BadCheckpoint: there is no such file, or it is damaged.
    """
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise BadCheckpoint(f"{path} is too large to be read.")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadCheckpoint(f"{path} cannot be read ({error.strerror}): {path.parent} is no checkpoint.") from error
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{path} is damaged: {error}.") from error


def sha256(path: str | Path) -> str:
    """Of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def config_sha256(config: Mapping[str, Any]) -> str:
    """SHA-256 of what a config says of the computation: names and versions may change, and the order of settings."""

    def kept(values: Any) -> Any:
        if isinstance(values, Mapping):
            return {key: kept(value) for key, value in values.items() if key not in NAMES}
        return values

    return hashlib.sha256(json.dumps(kept(config), sort_keys=True).encode()).hexdigest()


def _shapes(path: Path) -> list[int]:
    """The number of elements of each tensor, from the file's header."""
    try:
        with safe_open(str(path), framework="pt") as file:
            sizes = []
            for name in file.keys():  # noqa: SIM118, a safetensors file is no mapping
                size = 1
                for length in file.get_slice(name).get_shape():
                    size *= length
                sizes.append(size)
            return sizes
    except (OSError, SafetensorError) as error:
        raise BadCheckpoint(f"{path} cannot be read as safetensors: {error}.") from error


def _walk(values: Any) -> list[tuple[Any, Any]]:
    """All (key, value) of nested JSON objects, but for the names of classes, which are anything."""
    pairs, rest = [], [values]
    while rest:
        at = rest.pop()
        if isinstance(at, Mapping):
            settings = [(key, value) for key, value in at.items() if key not in ("id2label", "label2id")]
            pairs.extend(settings)
            rest.extend(value for _, value in settings)
        elif isinstance(at, (list, tuple)):
            rest.extend(at)
    return pairs


def _largest(value: Any) -> int:
    values = value if isinstance(value, (list, tuple)) else [value]
    return max((number for number in values if isinstance(number, int)), default=0)


def _expect(holds: bool, name: str, value: Any) -> None:
    if not holds:
        raise BadCheckpoint(f"the checkpoint's recipe is damaged: {name} is {repr(value)[:200]}.")
