"""`RegisterPlan`: what to do to a model, as a value that can be compared, saved and shared."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .errors import BadPlan
from .hub import on_hub, sharing
from .law import MOST_REGISTERS, Law
from .values import by_block, held, index, indices, resting

FORMAT = "testreg-plan"
VERSION = 2
READABLE = (1, 2)  # 1 knows neither the attention form nor a law
FORMS = ("dynamic", "constant", "attention")
BEFORE, ON = "before", "on"  # where registers of a language model stand: before its first token, or on its place


@dataclass(frozen=True, eq=False)
class RegisterPlan:
    """Which neurons to take from the patches, and what the registers are that take their place.

    Two plans are equal when they do the same to a model; where they come from does not count.

    Args:
        neurons: block index -> indices of its register neurons, both from 0.
        registers: how many there are at the size that they were found at, at least 1 (or 0 with no neurons to receive).
        entry: the block before which they join; 0 = together with the embeddings, as in the paper. In the attention
            form, the first block whose attention has them.
        state: what they are. None = zeros, which join as tokens and then receive the neurons' maxima (the dynamic form,
            the paper's). A tensor `(channels,)` or `(registers, channels)` in the units of the residual stream =
            tokens that join with it (constant); the neurons are only taken away from the other tokens. A tensor
            `(blocks from entry on, registers, channels)` = what attention gets in front of its tokens in each of these
            blocks, in the units of its own input; no token joins, nothing else in the network sees them (attention).
        provenance: where the plan comes from, plain JSON values: scores, settings tried, images, versions.
        rest: block index -> what its register neurons, in ascending order, have on all other tokens: best their mean
            over ordinary patches. None = 0, as in the paper.
        form: "dynamic", "constant" or "attention"; by default what the state's shape says.
        law: how many registers for how many patches; None = as many at every size.
        positions: of a language model's plan, where its registers stand: "before" its first token, as a start token of
            the model's own would, or "on" its place. None = the plan is a vision tower's.

    Raises:
        BadPlan: a value is of the wrong type or out of range.
    """

    neurons: Mapping[int, tuple[int, ...]]
    registers: int = 1
    entry: int = 0
    state: Tensor | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    rest: Mapping[int, tuple[float, ...]] | None = None
    form: str = ""
    law: Law | None = None
    positions: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.neurons, Mapping):
            raise BadPlan(
                f"neurons must map blocks to neurons, as in {{7: (417,)}}, not be a {type(self.neurons).__name__}."
            )
        neurons = {index(block, "a block"): indices(row, block) for block, row in self.neurons.items()}
        object.__setattr__(self, "neurons", dict(sorted((block, row) for block, row in neurons.items() if row)))
        if self.rest is not None:
            object.__setattr__(self, "rest", resting(self.rest, self.neurons))
        registers, entry = index(self.registers, "registers"), index(self.entry, "entry")
        if registers > MOST_REGISTERS:
            raise BadPlan(f"registers is {registers}; at most {MOST_REGISTERS} make sense, and usually 1 to 8.")
        object.__setattr__(self, "registers", registers)
        object.__setattr__(self, "entry", entry)
        state = None if self.state is None else held(self.state, registers)
        object.__setattr__(self, "state", state)
        form = _Form("dynamic" if state is None else "attention" if state.ndim == 3 else "constant")
        if self.form not in ("", form) and not isinstance(self.form, _Form):
            shape = "no state" if state is None else f"a state of the shape {tuple(state.shape)}"
            raise BadPlan(
                f"a plan with {shape} is of the form {form!r}, not {self.form!r}; attention needs (blocks from entry "
                f"on, registers, channels), constant (registers, channels), dynamic none."
            )
        object.__setattr__(self, "form", form)
        if self.law is not None and not isinstance(self.law, Law):
            raise BadPlan(f"law must be a testreg.runtime.law.Law, not a {type(self.law).__name__}.")
        if self.positions is not None and (self.positions not in (BEFORE, ON) or self.law):
            raise BadPlan(f"positions must be {BEFORE!r} or {ON!r}, and go with no law, not {self.positions!r:.50}.")
        if self.positions is not None and registers and form != "attention":
            raise BadPlan("registers of a language model are of the attention form: state must have three dimensions.")
        if self.law is not None and not registers:
            raise BadPlan("a plan without registers has no law of their number: leave law out.")

    def registers_for(self, patches: int) -> int:
        """How many registers an image of `patches` patches has, also where that is a symbol of a tracer."""
        return self.registers if self.law is None else self.law(patches)

    @property
    def language(self) -> bool:
        """Whether it is a plan for a language model."""
        return self.positions is not None

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what the plan does."""
        values = {key: value for key, value in self.to_dict().items() if key != "provenance"}
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
        if self.state is not None:
            digest.update(self.state.contiguous().numpy().tobytes())
        return digest.hexdigest()

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """All register neurons as (block, neuron)."""
        return tuple((block, neuron) for block, row in self.neurons.items() for neuron in row)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RegisterPlan):
            return NotImplemented
        if self._discrete() != other._discrete():
            return False
        return self.state is None or other.state is None or torch.equal(self.state, other.state)

    def __hash__(self) -> int:
        return hash((self.pairs, self.registers, self.entry, self.form, self.law, self.positions))

    def _discrete(self) -> tuple[Any, ...]:
        return self.neurons, self.registers, self.entry, self.form, self.rest, self.law, self.positions

    def __str__(self) -> str:
        neurons = ", ".join(f"({block}, {neuron})" for block, neuron in self.pairs[:8]) + (
            ", ..." if len(self.pairs) > 8 else ""
        )
        where = "joining with the embeddings" if self.entry == 0 else f"joining before block {self.entry}"
        if self.form == "attention":
            where = f"from block {self.entry} on"
        sizes = f" ({self.law})" if self.law and not self.law.constant else ""
        return (
            f"{self.registers} {self.form} register{'s' * (self.registers != 1)} {where}{sizes}; "
            f"{len(self.pairs)} register neuron{'s' * (len(self.pairs) != 1)} (block, neuron): {neurons or 'none'}"
        )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: the state as a tensor, all else as readable JSON in its metadata.

        Folders that are missing are made. `~` is the home directory.
        """
        file = Path(path).expanduser()
        file.parent.mkdir(parents=True, exist_ok=True)
        tensors = {} if self.state is None else {"state": self.state}
        metadata = {"format": FORMAT, "plan": json.dumps(self.to_dict(), sort_keys=True)}
        file.write_bytes(save(tensors, metadata))  # `save_file` makes a file that only its owner may read

    @classmethod
    def of(cls, given: Any, model: Any = None) -> RegisterPlan:
        """A plan that was given as itself, as the path of its file, as a name on the hub, or as what `to_dict` gives of
        a dynamic one.

        Args:
            model: for which, of several on the hub.

        Raises:
            BadPlan: it is nothing of the kind, or `load` or `from_dict` refuses it.
        """
        if isinstance(given, cls):
            return given
        if isinstance(given, (str, os.PathLike)):
            return cls.load(given, model=model if on_hub(given) else None)
        if isinstance(given, Mapping) and "neurons" in given:
            if given.get("form") in FORMS and given["form"] != "dynamic":
                raise BadPlan(
                    f"the dict describes {given['form']} registers, and what they hold is not in it: give the plan "
                    f"itself, or the file that plan.save(FILE) writes."
                )
            return cls.from_dict({**given})
        shown = "{7: (417,)}"
        if isinstance(given, Mapping):
            raise BadPlan(
                f"a dict is no register plan; where it maps blocks to neurons, as in {shown}, write "
                f"testreg.RegisterPlan({shown})."
            )
        raise BadPlan(
            f"a register plan is needed, what testreg.find(model, images) gives, or the path of its file, not a "
            f"{type(given).__name__}."
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, model: Any = None, **hub: Any) -> RegisterPlan:
        """Read a file that `save` wrote, or a plan that `push_to_hub` shared.

        Args:
            path: a file, a checkpoint with registers, or a repository of the hub: `"owner/name"`, with a revision
                `"owner/name@v1"`, of several plans one `"owner/name:file.safetensors"`.
            model: what the plan is for. Of several plans in a repository the one that was found on its weights is
                taken, and a plan that was found on others refused.
            hub: `filename`, `subfolder`, `revision`, `token`, `cache_dir` and whatever else `hf_hub_download` takes;
                `force=True` takes a plan for any model. Without it, `patch` checks once more that a plan from the hub
                was found on the weights that it is put on.

        Raises:
            BadPlan: the plan is missing, damaged, of an unknown version, for other weights, or holds values out of
                range.
        """
        if hub or model is not None or Path(path).is_dir() or on_hub(path):
            return sharing().load(path, model, **hub)
        try:
            with safe_open(Path(path).expanduser(), framework="pt") as file:
                metadata = file.metadata() or {}
                names = list(file.keys())
                if metadata.get("format") != FORMAT or set(names) - {"state"}:
                    raise BadPlan(
                        f"{path} is no register plan; testreg.RegisterPlan.save or `testreg find --out` writes one."
                    )
                state = file.get_tensor("state") if names else None
            values = json.loads(metadata.get("plan", ""))
        except (OSError, SafetensorError, ValueError, RecursionError) as error:
            raise BadPlan(
                f"{path} cannot be read as a register plan: {error}. `testreg find --out` writes one."
            ) from error
        return cls.from_dict(values, state)

    def push_to_hub(self, name: str, **settings: Any) -> str:
        """Share the plan: the file, a card with the model, the numbers and a picture of norms, and a line in the list
        of the repository's plans, by which `load(name, model=model)` finds it.

        Args:
            name: a repository of the hub, `"owner/name"`, of one plan or of many; made where it is not there.
            settings: `filename`, by default after the model; `private`, `revision`, `token`; `force=True` replaces a
                plan of other weights.

        Returns:
            The address of the commit.

        Raises:
            BadPlan: the repository cannot be written, or has another model's plan of that name.
        """
        return sharing().push(self, name, **settings)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; the state's numbers stay in their tensor."""
        return {
            "version": VERSION,
            "neurons": {str(block): list(row) for block, row in self.neurons.items()},
            "registers": self.registers,
            "entry": self.entry,
            "form": str(self.form),
            "rest": None if self.rest is None else {str(block): list(row) for block, row in self.rest.items()},
            "law": None if self.law is None else self.law.to_dict(),
            "positions": self.positions,
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_dict(cls, values: Any, state: Tensor | None = None) -> RegisterPlan:
        """The inverse of `to_dict`; nothing in `values` is trusted.

        Raises:
            BadPlan: anything but the values that `to_dict` gives.
        """
        version = values.get("version") if isinstance(values, dict) else None
        if version is None:
            raise BadPlan(f"a plan is a RegisterPlan, a path, or what plan.to_dict() gave, not {values!r:.100}.")
        if isinstance(version, bool) or version not in READABLE:
            raise BadPlan(
                f"the plan is of version {version!r:.50}; this testreg reads versions {', '.join(map(str, READABLE))}: "
                f"pip install -U testreg."
            )
        provenance = values.get("provenance", {})
        if not isinstance(provenance, dict):
            raise BadPlan(f"the plan's provenance must be a JSON object, not {provenance!r:.100}.")
        form = values.get("form")
        if form not in FORMS or (form == "dynamic") != (state is None):
            raise BadPlan(f"the plan calls itself {form!r:.50}, but has {'no' if state is None else 'a'} state.")
        if state is not None and not state.is_floating_point():
            raise BadPlan(f"the register state is of {state.dtype}; a floating-point tensor is needed.")
        return cls(
            by_block(values.get("neurons"), "neurons"),
            registers=values.get("registers", 1),
            entry=values.get("entry", 0),
            state=state,
            rest=None if values.get("rest") is None else by_block(values["rest"], "rest"),
            provenance=provenance,
            form=form,
            law=None if values.get("law") is None else Law.from_dict(values["law"]),
            positions=values.get("positions"),
        )


class _Form(str):
    """A form that a state's shape told; where `dataclasses.replace` hands it on with another state, it is no wish."""

    __slots__ = ()
