"""Which files of a folder are taken for audio, and which for images: by the ends of their names, in lower case.

What is in a file decides how it is read; the name only decides whether it is an item at all.
"""

from __future__ import annotations

from collections.abc import Mapping

AUDIO = frozenset(
    {".aif", ".aifc", ".aiff", ".au", ".caf", ".rf64", ".snd", ".sph", ".w64", ".wav", ".wave"}
    | {".ape", ".flac", ".tta", ".wv"}
    | {".3gp", ".aac", ".amr", ".m4a", ".m4b", ".mka", ".mp3", ".mp4", ".mpga", ".oga", ".ogg", ".opus"}
    | {".weba", ".webm", ".wma"}
)
IMAGE = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".dib", ".gif"}
    | {".pgm", ".ppm", ".pbm", ".pnm"}
    | {".heic", ".heif", ".hif", ".avif"}
)

ANY = AUDIO | IMAGE
BY_MEDIA: Mapping[str, frozenset[str]] = {"audio": AUDIO, "image": IMAGE}
