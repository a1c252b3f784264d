"""Plans on the hub: fetched, found among many by a model's fingerprint, and pushed with a card.

A repository of plans holds plan files, `plans.json`, which says of which model each of them is, a card, and a picture
of norms per plan. With one plan or with many it is the same kind of repository. A patched checkpoint, which has no such
list, gives the plan that lies in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RemoteEntryNotFoundError
from torch import nn

from ..runtime import __version__
from ..runtime.errors import BadPlan
from ..runtime.fingerprint import check_base, fingerprint
from ..runtime.fingerprint import name as name_of
from ..runtime.hub import ON_HUB
from ..runtime.modeling_testreg import first_line
from ..runtime.plan import RegisterPlan
from ..runtime.recipe import PLAN
from .plan_card import MARK, norms_picture, plan_card

INDEX = "plans.json"
TOLD = ("form", "registers", "resolution", "artefact", "nature", "before", "after")  # what the list says of a plan
TURNS = 5  # tries to commit while others commit to the same repository


def load(
    path: str | PathLike[str],
    model: nn.Module | None = None,
    *,
    filename: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    force: bool = False,
    **hub: Any,
) -> RegisterPlan:
    """A plan from the hub, or from the disk; see `RegisterPlan.load`.

    Raises:
        BadPlan: there is no such plan, there are several, or `model` holds other weights than it was found on.
    """
    local, found = Path(path).expanduser(), ON_HUB.fullmatch(str(path))
    if local.exists() or not found:
        plan = RegisterPlan.load(local / (filename or PLAN) if local.is_dir() else local)
    else:
        name, revision, filename = found["name"], revision or found["revision"], filename or found["file"]
        if filename is None:
            folder = f"{subfolder}/" if subfolder else ""
            try:
                listed = _listed(name, revision, hub)
            except _NotCached:  # a patched checkpoint has no list, and offline nobody can tell
                listed = {}
            filename, subfolder = _named(name, listed, model, folder), None
        file = _download(name, filename, subfolder, revision, hub)
        plan = RegisterPlan.load(file)
        # A file of the hub's cache lies in a folder named by its commit.
        at = next((part for part in file.parts[::-1] if re.fullmatch(r"[0-9a-f]{40}", part)), revision)
        origin = {"name": name, "file": "/".join(filter(None, (subfolder, filename))), "revision": at, "force": force}
        plan = replace(plan, provenance={**plan.provenance, "hub": origin})
    if model is not None and not force:
        check_base(plan, model)
    return plan


def push(
    plan: RegisterPlan,
    name: str,
    *,
    filename: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    force: bool = False,
) -> str:
    """Write `plan` to a repository of the hub, made where it is not there; see `RegisterPlan.push_to_hub`.

    Raises:
        BadPlan: the repository cannot be written, or holds another model's plan under that name.
    """
    base: Any = plan.provenance.get("base")
    base = base if isinstance(base, Mapping) else {}
    filename = filename or _file_of(str(base.get("model") or ""))
    told = {key: plan.provenance[key] for key in TOLD if key in plan.provenance}
    row = {
        **told,
        **{key: base.get(key) for key in ("model", "class", "fingerprint")},
        "plan": str(plan),
        "form": plan.form,
        "registers": plan.registers,
        "versions": {"testreg": __version__},
    }
    api = HfApi(token=token)
    try:
        with TemporaryDirectory() as folder:
            plan.save(Path(folder) / "plan")
            content = (Path(folder) / "plan").read_bytes()
        api.create_repo(name, private=private, exist_ok=True)
        for turn in range(TURNS):
            info = api.model_info(name, revision=revision)
            head, held = info.sha, {file.rfilename for file in info.siblings or ()}
            listed = _listed(name, head, {"token": token})
            there = listed.get(filename)
            if there and not force and not _alike(there.get("fingerprint"), base.get("fingerprint")):
                raise BadPlan(
                    f"{name} has a plan {filename} for {there.get('model') or 'another model'!r} already: give another "
                    f"filename (--push {name}:NAME.safetensors), or force=True (--force) to replace it."
                )
            rows = dict(sorted({**listed, filename: row}.items()))
            files = {filename: content, INDEX: (json.dumps(rows, indent=2) + "\n").encode()}
            if picture := norms_picture(plan):
                files[_picture_of(filename)] = picture
            if _ours(name, head, token):
                pictures = {file: _picture_of(file) for file in rows if _picture_of(file) in held | files.keys()}
                files["README.md"] = str(plan_card(name, rows, pictures)).encode()
            try:
                done = api.create_commit(
                    name,
                    [CommitOperationAdd(file, data) for file, data in files.items()],
                    commit_message=f"Registers of {base.get('model') or filename}",
                    revision=revision,
                    parent_commit=head,
                )
                return str(done.commit_url)
            except HfHubHTTPError as error:
                status = getattr(error.response, "status_code", None)
                if status not in (409, 412) or turn == TURNS - 1:  # somebody else committed meanwhile
                    raise
    except BadPlan:
        raise
    except Exception as error:  # of the hub's client: offline, no access, no such user
        raise BadPlan(
            f"the plan could not be written to {name} on the hub: {first_line(error)}. Keep it with found.save(FILE) "
            f"(--out FILE) and try again: `hf auth login` says who you are."
        ) from error
    raise AssertionError("each turn returns or raises")


def has_plan(model: nn.Module, names: tuple[str, ...], **hub: Any) -> str | None:
    """The first plan for `model` in the repositories `names`, as `owner/name:file`; None where there is none.

    Raises:
        BadPlan: a repository cannot be had.
    """
    actual = fingerprint(model) if names else {}
    for name in names:
        for file, row in _listed(name, None, hub).items():
            if _alike(row.get("fingerprint"), actual):
                return f"{name}:{file}"
    return None


def _named(name: str, listed: Mapping[str, Mapping[str, Any]], model: nn.Module | None, folder: str) -> str:
    """The file of the one plan that is meant."""
    listed = {file: row for file, row in listed.items() if file.startswith(folder)}
    if not listed:
        return f"{folder}{PLAN}"
    if model is None:
        if len(listed) == 1:
            return next(iter(listed))
        raise BadPlan(
            f"{name} holds {len(listed)} plans ({_some(listed)}): name one, as in {name}:FILE, or have it found for a "
            f"model: RegisterPlan.load({name!r}, model=model) (--plans {name})."
        )
    actual = fingerprint(model)
    fitting = [file for file, row in listed.items() if _alike(row.get("fingerprint"), actual)]
    if len(fitting) == 1:
        return fitting[0]
    called = name_of(model) or type(model).__name__
    if fitting:
        raise BadPlan(
            f"{name} holds {len(fitting)} plans for {called} ({_some(fitting)}): name one, as in {name}:FILE."
        )
    models = dict.fromkeys(str(row.get("model")) for row in listed.values())
    raise BadPlan(
        f"{name} holds no plan for the weights of {called!r}; it has some for {_some(models)}. Find its own with "
        f"testreg.find, or `testreg find MODEL --images photos/ --push {name}`."
    )


def _listed(name: str, revision: str | None, hub: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Plan file -> what a repository's list says of it; a stranger's, so only its form is relied on."""
    try:
        content = _download(name, INDEX, None, revision, hub).read_bytes()
    except _NoFile:
        return {}
    try:
        rows = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadPlan(f"{INDEX} of {name} is damaged: {first_line(error)}. Name a plan, as in {name}:FILE.") from error
    if not isinstance(rows, dict) or not all(isinstance(row, dict) and _inside(file) for file, row in rows.items()):
        raise BadPlan(f"{INDEX} of {name} is no list of plans. Name a plan, as in {name}:FILE.")
    return rows


class _NoFile(BadPlan):
    """The repository is there, the file is not."""


class _NotCached(BadPlan):
    """The hub cannot be reached, and its cache has no such file."""


def _download(name: str, filename: str, subfolder: str | None, revision: str | None, hub: Mapping[str, Any]) -> Path:
    """A file of the hub, from its cache where that is current, or the hub cannot be reached.

    Raises:
        BadPlan: neither has it.
    """
    settings = {**hub, "revision": revision, "subfolder": subfolder}
    try:
        return Path(hf_hub_download(name, filename, **settings))
    except RemoteEntryNotFoundError as error:
        raise _NoFile(f"{name} on the hub has no file {filename}. Which it has, its page says.") from error
    except LocalEntryNotFoundError as error:
        raise _NotCached(
            f"{filename} of {name} is neither here nor in the hub's cache on this disk, and the hub cannot be reached: "
            f"{first_line(error)}. Load it once online, or give a plan's file."
        ) from error
    except Exception as error:  # of the hub's client: no such name, no access, a full disk
        raise BadPlan(
            f"{name} is no file here, and no plan can be had from the hub under that name: {first_line(error)}"
        ) from error


def _ours(name: str, revision: str | None, token: str | None) -> bool:
    """Whether the card may be written: there is none, or it was written here before."""
    try:
        return MARK in _download(name, "README.md", None, revision, {"token": token}).read_text(encoding="utf-8")
    except _NoFile:
        return True


def _alike(one: Any, other: Any) -> bool:
    """Whether two fingerprints are of the same weights in any precision that both know."""
    if not isinstance(one, Mapping) or not isinstance(other, Mapping):
        return False
    return any(one[dtype] == other[dtype] for dtype in one.keys() & other.keys())


def _inside(file: str) -> bool:
    """Whether a file's name stays inside its repository."""
    path = PurePosixPath(file)
    return file.endswith(".safetensors") and not path.is_absolute() and ".." not in path.parts and "\\" not in file


def _file_of(model: str) -> str:
    slug = re.sub(r"[^\w.-]+", "--", model).strip(".-")
    return f"{slug}.safetensors" if slug else PLAN


def _picture_of(file: str) -> str:
    return str(PurePosixPath(file).with_suffix(".png"))


def _some(names: Any) -> str:
    names = list(names)
    return ", ".join(map(str, names[:6])) + (", ..." if names[6:] else "")
