"""Plans that are named as on the hub. What speaks to it is in `testreg.checkpoints.sharing`."""

from __future__ import annotations

import os
import re
from importlib import import_module
from pathlib import Path
from typing import Any

from .errors import TestregError

# A repository of the hub: owner/name, owner/name@revision, owner/name:file or owner/name@revision:file.
ON_HUB = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*?)(?<!\.safetensors)(@(?P<revision>[^:]+))?(:(?P<file>.+))?")


def on_hub(path: str | os.PathLike[str]) -> bool:
    """Whether a plan is given as a name on the hub: nothing on this disk has it."""
    return bool(ON_HUB.fullmatch(os.fspath(path))) and not Path(path).expanduser().exists()


def sharing() -> Any:
    """What speaks to the hub: not among the files that travel with a checkpoint, so asked for by name when wanted."""
    try:
        return import_module("testreg.checkpoints.sharing")
    except ModuleNotFoundError as error:
        raise TestregError("plans on the hub need testreg itself: pip install testreg.") from error
