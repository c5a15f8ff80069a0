"""Adapters on the Hugging Face hub. The upload runs in a process of its own: `python -m tuneavideo.web.hub`.

A token that a user types is passed through memory and a pipe; it is never written to a file or a log.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuneavideo.bases import BASES, is_hub_id
from tuneavideo.errors import RunError, SettingsError, TuneAVideoError, error_line
from tuneavideo.storage.run_folder import RunFolder
from tuneavideo.web.events import Events
from tuneavideo.web.requests import answer, answer_of, short

LONGEST = 3600.0  # seconds of an upload


class Pushes:
    """The uploads of this server, by run.

    Attributes:
        states: The last upload of each run: `state` (`running`, `done` or `failed`), `text`, `link` (at first empty).
    """

    def __init__(self, events: Events) -> None:
        self.events, self.states = events, dict[str, dict[str, str]]()
        self._tasks = set[asyncio.Task[None]]()

    def begin(self, run: RunFolder, repository: str, token: str, *, is_private: bool) -> None:
        """Begin to upload the adapter of a run.

        Args:
            run: A tuned run.
            repository: Hub id of the repository, which is made if it does not exist.
            token: Token with the right to write. Empty: that of the environment or of `hf auth login`.
            is_private: Whether a new repository is private.

        Raises:
            TuneAVideoError: The repository's name is wrong, the run is not tuned, or it is uploaded already.
        """
        name, repository = run.path.name, repository.strip()
        if not is_hub_id(repository) or ".." in repository:
            raise SettingsError("repository: expected a hub id such as OWNER/NAME")
        if not run.is_tuned:
            raise RunError("this run is not tuned to its end; there is no adapter to push")
        if self.states.get(name, {}).get("state") == "running":
            raise RunError("this run is pushed already; wait until it is done")
        self._publish(name, state="running", text=f"pushing to {repository}")
        arguments = {"run": str(run.path), "repository": repository, "token": token.strip(), "is_private": is_private}
        task = asyncio.create_task(self._push(name, arguments))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        """End the uploads."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _push(self, name: str, arguments: dict[str, Any]) -> None:
        try:
            done = await answer_of(
                "tuneavideo.web.hub", arguments, seconds=LONGEST, kind=RunError, what="pushing to the hub"
            )
            self._publish(name, state="done", text="pushed to", link=done["link"])
        except TuneAVideoError as error:
            self._publish(name, state="failed", text=f"not pushed: {error_line(error)}")

    def _publish(self, name: str, **state: str) -> None:
        self.states[name] = {"link": "", **state}
        self.events.publish("push", {"run": name, **self.states[name]})


def push(run: str, repository: str, token: str, is_private: bool) -> dict[str, str]:
    """Upload the adapter of a run with a model card to the hub, and return the address of the repository as `link`.

    Neither the clip nor its path is uploaded.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    folder = RunFolder.open(run)
    with folder.locked():
        folder.require_model()
        config = json.loads((folder.adapter / "adapter_config.json").read_bytes())
        config["base"] = public_name(config["base"])
        files: dict[str, bytes | Path] = {
            "README.md": card(folder, repository, config["base"]).encode(),
            "adapter_config.json": json.dumps(config, indent=1).encode(),
            "adapter.safetensors": folder.adapter / "adapter.safetensors",
        }
        hub = HfApi(token=token or None)
        place = hub.create_repo(repository, private=is_private, exist_ok=True)
        operations = [CommitOperationAdd(name, contents) for name, contents in files.items()]
        hub.create_commit(place.repo_id, operations, commit_message="Adapter of tuneavideo")
    return {"link": str(place)}


def public_name(base: str) -> str:
    """Return the hub id of a base if it has one, and of a path its last part only."""
    if base in BASES:
        return base if base == "miniature" else BASES[base].source
    return base if is_hub_id(base) else Path(base).name


def card(run: RunFolder, repository: str, base: str) -> str:
    """Return the model card of an adapter, in Markdown."""
    own = run.read_settings()
    steps = run.about.get("steps", own.max_train_steps)
    return f"""---
{f"base_model: {base}" if is_hub_id(base) else "tags: [local-base]"}
library_name: tuneavideo
pipeline_tag: video-to-video
---
# {repository.partition("/")[2]}

A [Tune-A-Video](https://arxiv.org/abs/2212.11565) adapter: the motion of one clip ({json.dumps(own.prompt)}),
learned by `{base}` in {steps} steps with the preset `{own.preset}`. Neither the base nor the clip is in here.
With the files in a folder `adapter`:

```python
from tuneavideo import TuneAVideoPipeline

pipe = TuneAVideoPipeline.from_pretrained("{base}", adapter="adapter")
```
"""


def _message(error: Exception, arguments: Mapping[str, Any]) -> str:
    line, token = error_line(error) if isinstance(error, TuneAVideoError) else short(error), arguments["token"]
    return line.replace(token, "TOKEN") if token else line


if __name__ == "__main__":
    answer(push, _message)
