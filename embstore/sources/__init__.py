"""What a path given to `embstore extract PATH` means: a folder, a manifest or a Kaldi data folder.

A folder is walked (folder.py), unless it holds `wav.scp`: then it is Kaldi's (kaldi.py). A file is a manifest
(manifest.py). All of them give entries in the dataset's order and keep a list of what could not become an item.
Nothing here knows of the database or of audio.
"""

from __future__ import annotations

import os
from pathlib import Path

from embstore.errors import UsageError
from embstore.sources.base import Entry, Problem, Source, printable
from embstore.sources.folder import FolderSource
from embstore.sources.kaldi import KaldiSource, read_recordings
from embstore.sources.listed import Under
from embstore.sources.manifest import ENDINGS, ManifestSource, manifest_format
from embstore.sources.natural import natural_key
from embstore.sources.speaker import CHOICES, DEFAULT, SpeakerRule, speaker_rule

SPEAKER_FROM_CHOICES = CHOICES

__all__ = ["SPEAKER_FROM_CHOICES", "Entry", "Problem", "Source", "natural_key", "open_source"]


def open_source(
    path: Path, *, extensions: frozenset[str], speaker_from: str = DEFAULT, root: Path | None = None
) -> Source:
    """Open what `path` names; nothing but a manifest's header, or `wav.scp`, is read yet.

    `extensions` says which files of a folder count, in any case, with or without the dot. `speaker_from` is explained
    at `speaker_rule`; its default leaves a manifest's speakers to the manifest. `root` is the folder under which every
    file of a manifest or a Kaldi folder must lie; by default the manifest's folder, or the one that holds all of
    Kaldi's recordings. Raises UsageError.
    """
    rule = speaker_rule(speaker_from)
    own_rule = None if speaker_from == DEFAULT else rule
    path = Path(os.path.abspath(path))  # noqa: PTH100 (the name is as given, not where a link leads)
    wanted = frozenset("." + extension.lower().lstrip(".") for extension in extensions)
    source: Source
    if not _is_folder(path):
        if manifest_format(path) is None or not path.is_file():
            raise UsageError(_not_accepted(path, wanted))
        source = _open_manifest(path, root, own_rule)
    elif (path / "wav.scp").is_file():
        source = _open_kaldi(path, root, own_rule)
    else:
        source = _open_folder(path, root, wanted, rule)
    if (shown := printable(str(source.root))) != str(source.root):
        raise UsageError(f"the root '{shown}' is not printable UTF-8 text; rename it")
    return source


def _is_folder(path: Path) -> bool:
    try:
        path.stat()
        if path.is_dir():
            with os.scandir(path):
                return True
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(
            f"no folder or manifest at '{printable(str(path))}'; give the folder that holds your files"
        ) from None
    except OSError as error:
        raise UsageError(f"'{printable(str(path))}' cannot be read: {error.strerror}") from None
    return False


def _not_accepted(path: Path, wanted: frozenset[str]) -> str:
    if path.suffix.lower() in wanted:
        return f"'{path}' is a single file; give its folder, '{path.parent}', or a manifest that lists it"
    if path.name == "wav.scp":
        return f"'{path}' is part of a Kaldi data folder; give the Kaldi folder that holds it, '{path.parent}'"
    return f"'{path}' is neither a folder nor a manifest ({' '.join(ENDINGS)}, or one of these with .gz)"


def _open_folder(path: Path, root: Path | None, wanted: frozenset[str], rule: SpeakerRule) -> FolderSource:
    if root is not None:
        raise UsageError(f"--root is for a manifest or a Kaldi folder; the root of the folder '{path}' is the folder")
    return FolderSource(root=path.resolve(), name=_name(path.resolve().name), extensions=wanted, speaker_of=rule)


def _open_manifest(path: Path, root: Path | None, rule: SpeakerRule | None) -> ManifestSource:
    folder = path.parent.resolve()
    if root is None:
        under = Under(folder, folder, [path.parent])
    else:
        real = _root(root)
        under = Under(real, folder if folder.is_relative_to(real) else real, [Path(os.path.abspath(root))])  # noqa: PTH100
    plain = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return ManifestSource(root=under.root, name=_name(plain.stem), manifest=path, under=under, speaker_of=rule)


def _open_kaldi(path: Path, root: Path | None, rule: SpeakerRule | None) -> KaldiSource:
    under = None
    if root is not None:
        real = _root(root)
        under = Under(real, real, [Path(os.path.abspath(root))])  # noqa: PTH100
    recordings = read_recordings(path, under)
    return KaldiSource(
        root=recordings.root, name=_name(path.resolve().name), folder=path, recordings=recordings, speaker_of=rule
    )


def _root(root: Path) -> Path:
    if not _is_folder(Path(os.path.abspath(root))):  # noqa: PTH100
        raise UsageError(f"--root '{root}' is not a folder")
    return root.resolve()


def _name(name: str) -> str:
    return name.strip() or "dataset"
