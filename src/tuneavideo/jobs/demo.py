"""Demo job: the bundled model tuned on a bundled clip, with a contact sheet of its edits."""

from __future__ import annotations

from pathlib import Path

from tuneavideo import video as videos
from tuneavideo.jobs.tune import tune
from tuneavideo.progress import Events, Progress
from tuneavideo.settings import TuneSettings
from tuneavideo.storage.run_folder import RunFolder
from tuneavideo.video.montage import contact_sheet


def demo(settings: TuneSettings, *, out: str | Path | None = None) -> Events:
    """Tune and edit as `settings` say, then draw the clip and its edits as one picture, `edits.png`."""
    rows: list[Path] = []
    for each in tune(settings, out=out):
        yield each
        if each.path and each.stage in ("tune", "edit"):
            rows.append(each.path / "edit.mp4" if each.stage == "edit" else RunFolder(each.path).source)
    if rows:  # the first process has them all, others none
        sheet = RunFolder(rows[0].parent).sheet
        clips = [videos.read(path) for path in rows]
        videos.write_image(contact_sheet(clips, [settings.prompt, *settings.edit]), sheet)
        yield Progress("picture", path=sheet)
