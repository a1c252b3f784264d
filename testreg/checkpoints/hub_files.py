"""Files of a repository on the hub: asked for once, and taken from its cache on this disk where it cannot be reached.

The hub's client by itself asks six times for a file that is not cached, for most of a minute and in raw log lines.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RemoteEntryNotFoundError

from ..runtime.errors import BadPlan
from ..runtime.modeling_testreg import first_line

SECONDS = 5.0  # until a hub that does not answer counts as one that cannot be reached
BUSY = 429  # and from 500 on: the hub answers, and gives nothing
HTTPError: Any = HfHubHTTPError.__bases__[0]  # of the HTTP library that this version of the client uses


class HubFiles:
    """Files of one repository at one revision.

    Attributes:
        name: of the repository.
        away: why the hub cannot be reached; empty as long as nobody asked, and where it answers.
    """

    def __init__(self, name: str, revision: str | None = None, hub: Mapping[str, Any] | None = None):
        self.name = name
        self.settings: dict[str, Any] = {**(hub or {}), "revision": revision}
        self.away = ""
        if is_offline_mode():
            self._leave("HF_HUB_OFFLINE=1 is set")
        elif self.settings.get("local_files_only"):
            self._leave("local_files_only=True was given")

    def get(self, filename: str, subfolder: str | None = None) -> Path | None:
        """A file, from the cache where that is current, or the hub cannot be reached; None = the hub has no such file.

        Raises:
            BadPlan: neither has it.
        """
        try:
            if not self.away:
                self._ask(filename, subfolder)
            return Path(hf_hub_download(self.name, filename, subfolder=subfolder, **self.settings))
        except RemoteEntryNotFoundError:
            return None
        except LocalEntryNotFoundError as error:
            why = self.away or first_line(error)
            raise BadPlan(
                f"{self.name} is no file here, the hub cannot be reached ({why}), and its cache on this disk holds no "
                f"{filename} of {self.name}. Try again online, or give a plan's file."
            ) from error
        except Exception as error:  # of the hub's client: no such name, no access, a full disk
            raise BadPlan(
                f"{self.name} is no file here, and no plan can be had from the hub under that name: "
                f"{first_line(error)}. Give its name there, as in owner/name, or a plan's file."
            ) from error

    def _ask(self, filename: str, subfolder: str | None) -> None:
        """Whether the hub answers, once; from then on the cache alone is asked where it does not."""
        given = {key: self.settings[key] for key in ("repo_type", "revision", "endpoint") if key in self.settings}
        seconds = self.settings.get("etag_timeout", SECONDS)
        try:
            get_hf_file_metadata(
                hf_hub_url(self.name, filename, subfolder=subfolder, **given),
                timeout=seconds,
                **{key: self.settings[key] for key in ("token", "headers", "endpoint") if key in self.settings},
            )
        except HfHubHTTPError as error:
            status = error.response.status_code
            if isinstance(error, RemoteEntryNotFoundError):
                raise
            if status == BUSY or status >= 500:
                self._leave(f"it answers {status}")
        except HTTPError as error:
            self._leave(first_line(error))

    def _leave(self, why: str) -> None:
        self.away = why
        self.settings["local_files_only"] = True
