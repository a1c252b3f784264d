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

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id
from torch import nn

from ..runtime import __version__
from ..runtime.errors import BadPlan
from ..runtime.fingerprint import check_base, fingerprint
from ..runtime.fingerprint import name as name_of
from ..runtime.hub import ON_HUB
from ..runtime.modeling_testreg import first_line
from ..runtime.plan import RegisterPlan
from ..runtime.recipe import PLAN
from .hub_files import HubFiles
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
        files = HubFiles(name, revision, hub)
        if filename is None:
            folder = f"{subfolder}/" if subfolder else ""
            try:
                listed = _listed(files)
            except BadPlan:
                if not files.away:
                    raise
                listed = {}  # a patched checkpoint has no list, and offline nobody can tell
            filename, subfolder = _named(name, listed, model, folder), None
        file = files.get(filename, subfolder)
        if file is None:
            raise BadPlan(f"{name} on the hub has no file {filename}. Which it has, its page says.")
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
        BadPlan: `name` or `filename` cannot be one, the repository cannot be written, or holds another model's plan
            under that name.
    """
    base: Any = plan.provenance.get("base")
    base = base if isinstance(base, Mapping) else {}
    filename = filename or _file_of(str(base.get("model") or ""))
    check_names(name, filename)
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
            listed = _listed(HubFiles(name, head, {"token": token}))
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
            if _ours(HubFiles(name, head, {"token": token})):
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
            f"(--out FILE) and try again; `hf auth whoami` says who you are there, `hf auth login` changes it."
        ) from error
    raise AssertionError("each turn returns or raises")


def has_plan(model: nn.Module, names: tuple[str, ...], **hub: Any) -> str | None:
    """The first plan for `model` in the repositories `names`, as `owner/name:file`; None where there is none.

    Raises:
        BadPlan: a repository cannot be had.
    """
    actual = fingerprint(model) if names else {}
    for name in names:
        for file, row in _listed(HubFiles(name, None, hub)).items():
            if _alike(row.get("fingerprint"), actual):
                return f"{name}:{file}"
    return None


def check_names(name: str, filename: str | None = None) -> None:
    """Whether a repository and a plan in it can be called so, before the work whose result they will hold.

    Raises:
        BadPlan: they cannot.
    """
    try:
        validate_repo_id(name)
        rightly = isinstance(name, str) and "/" in name
    except ValueError:
        rightly = False
    if not rightly:
        raise BadPlan(
            f"{name!r} is no name on the hub: it is owner/name, where owner is an account or an organisation, and both "
            f"are of letters, digits, '-', '_' and '.', without '--', '..' or an end in '-', '.' or '.git'. "
            f"A file in it is filename=NAME.safetensors (--push owner/name:NAME.safetensors)."
        )
    if filename and not _inside(filename):
        raise BadPlan(f"{filename!r} is no name for a plan: it is NAME.safetensors or FOLDER/NAME.safetensors.")


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


def _listed(files: HubFiles) -> dict[str, dict[str, Any]]:
    """Plan file -> what a repository's list says of it; a stranger's, so only its form is relied on."""
    file, name = files.get(INDEX), files.name
    if file is None:
        return {}
    try:
        rows = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadPlan(f"{INDEX} of {name} is damaged: {first_line(error)}. Name a plan, as in {name}:FILE.") from error
    if not isinstance(rows, dict) or not all(isinstance(row, dict) and _inside(file) for file, row in rows.items()):
        raise BadPlan(f"{INDEX} of {name} is no list of plans. Name a plan, as in {name}:FILE.")
    return rows


def _ours(files: HubFiles) -> bool:
    """Whether the card may be written: there is none, or it was written here before."""
    card = files.get("README.md")
    return card is None or MARK in card.read_text(encoding="utf-8")


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
