"""Read a stretch of any audio file as mono float32 at the sample rate a model wants.

libsndfile reads what it knows; FFmpeg reads the rest, and all MP3: libmpg123, inside libsndfile, writes notes about
harmless oddities to stderr that can't be turned off, and gives up on damage that FFmpeg steps over. Both look at the
content, not at the file's name, and both release the GIL, so that threads of one process decode side by side.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import FileIO
from itertools import chain
from pathlib import Path
from typing import IO, Any, Literal

import av
import av.error
import av.logging
import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from embstore.errors import ItemFailed
from embstore.media import files
from embstore.media.sinc import SincResampler

Channels = Literal["first", "mean"]
Resampling = Literal["soxr", "sinc"]
"""soxr is the better one; `sinc` is torchaudio's, for models that know nothing else."""

_BLOCK_VALUES = 1 << 22
"""Values (frames × channels) decoded at a time, so that memory follows the result and not the file's channels."""

_MEMORY_BYTES = 64 << 20
"""Samples that are kept in memory (17 minutes at 16 kHz); those of a longer stretch go through a temporary file."""

_BLOCK_FRAMES = 256
"""FFmpeg's frames (some 20 ms each) joined to one block."""

_SEEK_FROM = 10.0
"""Seconds before which FFmpeg's part decodes from the beginning and throws away, which is exact in every container."""

_MAX_FAULTS = 0.1
"""Broken packets for every good frame up to which a file still counts as readable."""

_PREROLL = 1.0
"""Seconds decoded and thrown away after a seek: MP3, AAC and Opus need some history for exact samples."""

_MAX_TIME_STAMP = 1 << 62

_SEEKABLE = {"mov", "mp4", "matroska", "webm", "mp3", "ogg"}
"""Containers whose time stamps can be trusted after a seek."""

# Only these, because FFmpeg also takes playlists (HLS, concat, DASH) that make it open other files and addresses.
_DEMUXERS = (
    "aac,ac3,aiff,amr,amrnb,amrwb,ape,asf,au,avi,caf,eac3,flac,flv,gsm,loas,matroska,mov,mp3,mp4,mpc,mpc8,mpeg,mpegts,"
    "nistsphere,ogg,rm,sox,tak,tta,voc,w64,wav,webm,wv"
)

_Block = tuple[int, NDArray[np.float32]]  # sample rate, samples [frames, channels]
_Decoder = Callable[[FileIO, float, float], Iterator[_Block]]  # the open file, begin and end in seconds

# FFmpeg's own messages would go to stderr between the lines of the progress display.
av.logging.set_level(None)


@dataclass(frozen=True, slots=True)
class Audio:
    """One stretch of audio."""

    samples: NDArray[np.float32]
    """float32 [n] at the sample rate asked for; full scale is 1. A long stretch is mapped from a temporary file."""
    seconds: float
    """Length that was read, before resampling."""


class _UndecodableError(ValueError):
    """A decoder opened the file, but it holds nothing that can be read as audio."""


def read(
    path: Path,
    start: float | None,
    duration: float | None,
    sample_rate: int,
    channels: Channels = "mean",
    resampling: Resampling = "soxr",
) -> Audio:
    """Read `duration` seconds from `start` (both in seconds; None: the beginning, all of the rest).

    A stretch that runs over the end gives what is there. Thread-safe. Memory is bounded however long the stretch is:
    more than 64 MB of samples are written to an unnamed file in the folder for temporary files (TMPDIR) and mapped,
    4 bytes a sample; the space is free again once the samples are garbage.
    Raises ItemFailed: `not_found`, `no_permission`, `is_a_directory`, `not_a_file`, `read_error`, `out_of_range`,
    `decode_error`, `empty_audio`, `not_finite`, `no_space`.
    """
    begin = 0.0 if start is None else start
    end = math.inf if duration is None else begin + duration
    if not 0 <= begin < end or math.isinf(begin):
        raise ItemFailed("out_of_range", f"a stretch from {begin:g} s to {end:g} s holds no audio")
    with files.opened(path) as file:
        samples, seconds = _decode(file, begin, end, _Collector(sample_rate, channels, resampling))
    if samples.size:
        return Audio(samples, seconds)
    if begin > 0:
        raise ItemFailed("out_of_range", f"the stretch starts at {begin:g} s, where the audio has ended")
    raise ItemFailed("empty_audio", "the file holds 0 samples")


def _decode(file: FileIO, begin: float, end: float, collector: _Collector) -> tuple[NDArray[np.float32], float]:
    """Samples and seconds of the stretch by the first decoder that can; a failure names what each one says."""
    head = file.read(3)
    if not head:
        raise ItemFailed("empty_audio", "the file has 0 bytes")
    decoders: dict[str, _Decoder] = {"ffmpeg": _ffmpeg}
    # Within the last page of an Ogg file libsndfile (1.2.2) seeks to a place beside the one that was asked for.
    if not (_is_mpeg_audio(head) or (head == b"Ogg" and begin > 0)):
        decoders = {"libsndfile": _libsndfile, **decoders}
    complaints = []
    for name, blocks in decoders.items():
        file.seek(0)
        try:
            return collector.collect(blocks(file, begin, end))
        except (soundfile.SoundFileError, av.error.FFmpegError, ValueError) as error:
            complaints.append(f"{name}: {_words(error)}")
    raise ItemFailed("decode_error", "; ".join(complaints))


def _is_mpeg_audio(head: bytes) -> bool:
    """Whether a file starts like MP1, MP2, MP3 or AAC in ADTS: with an ID3 tag or eleven set bits."""
    return head == b"ID3" or (len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0)


def _words(error: Exception) -> str:
    """A decoder's own words, in one line, without the file's number or address."""
    words = getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)
    return " ".join(str(words).split())


@dataclass(frozen=True, slots=True)
class _Collector:
    """Joins blocks to mono samples at one sample rate."""

    sample_rate: int
    channels: Channels
    resampling: Resampling

    def collect(self, blocks: Iterator[_Block]) -> tuple[NDArray[np.float32], float]:
        """The samples, and how many seconds they were."""
        resampler: soxr.ResampleStream | SincResampler | None = None
        frames, rate = 0, self.sample_rate
        with Pieces() as pieces:
            for rate, block in blocks:
                mono = _mono(block, self.channels)
                frames += len(mono)
                if rate != self.sample_rate:
                    resampler = resampler or self._resampler(rate)
                    mono = resampler.resample_chunk(mono)
                pieces.add(mono)
            if resampler:
                pieces.add(resampler.resample_chunk(np.empty(0, np.float32), last=True))
            return pieces.joined(), frames / rate

    def _resampler(self, rate: int) -> soxr.ResampleStream | SincResampler:
        if self.resampling == "sinc":
            return SincResampler(rate, self.sample_rate)
        return soxr.ResampleStream(rate, self.sample_rate, 1, dtype="float32", quality="HQ")


class Pieces:
    """Samples that come in pieces: in memory, and from `_MEMORY_BYTES` on in a file that nobody else sees."""

    def __init__(self) -> None:
        self._pieces: list[NDArray[np.float32]] = []
        self._bytes = 0
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Pieces:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()  # what is mapped stays

    def add(self, piece: NDArray[np.float32]) -> None:
        """Put a piece behind the others."""
        self._pieces.append(piece)
        self._bytes += piece.nbytes
        if self._bytes > _MEMORY_BYTES:
            self._flush()

    def joined(self) -> NDArray[np.float32]:
        """All samples, float32 [n]."""
        if self._file:
            self._flush()
            return np.memmap(self._file, np.float32, mode="r+")
        return self._pieces[0] if len(self._pieces) == 1 else np.concatenate([np.empty(0, np.float32), *self._pieces])

    def _flush(self) -> None:
        try:
            self._file = self._file or tempfile.TemporaryFile(prefix="embstore-")  # noqa: SIM115  closed by __exit__
            for piece in self._pieces:
                self._file.write(piece.data)
            self._file.flush()
        except OSError as error:
            reason = f"a long recording has no room in the folder for temporary files ({error.strerror}); set TMPDIR"
            raise ItemFailed("no_space", reason) from error
        self._pieces.clear()


def _mono(block: NDArray[np.float32], channels: Channels) -> NDArray[np.float32]:
    """One channel out of [frames, channels]; NaN or infinity in it is a fault of the file."""
    with np.errstate(invalid="ignore"):
        mono = block[:, 0] if channels == "first" or block.shape[1] == 1 else block.mean(axis=1)
    if not np.isfinite(mono).all():
        raise ItemFailed("not_finite", "the samples contain NaN or infinity")
    return np.ascontiguousarray(mono)


def _range(begin: float, end: float, rate: int) -> tuple[int, int]:
    """First frame of a stretch and the frame after its last; neighbouring stretches meet without gap or overlap."""
    return round(begin * rate), sys.maxsize if math.isinf(end) else round(end * rate)


def _libsndfile(file: FileIO, begin: float, end: float) -> Iterator[_Block]:
    """The stretch's blocks, read through the file's descriptor (a Python file object would take the GIL to read)."""
    with soundfile.SoundFile(file.fileno(), closefd=False) as sound:
        first, stop = _range(begin, end, sound.samplerate)
        stop = min(stop, sound.frames)
        if 0 < first < stop:
            sound.seek(first)
        while first < stop:
            count = min(stop - first, max(1, _BLOCK_VALUES // sound.channels))
            block = sound.read(count, dtype="float32", always_2d=True)
            if not len(block):
                return
            first += len(block)
            yield sound.samplerate, block


def _ffmpeg(file: FileIO, begin: float, end: float) -> Iterator[_Block]:
    """The stretch's blocks, decoded by FFmpeg from the file's first audio stream."""
    # Tags in old encodings are none of our business, but PyAV decodes them, strictly unless told otherwise.
    with av.open(file, "r", options={"format_whitelist": _DEMUXERS}, metadata_errors="replace") as container:
        if not container.streams.audio:
            raise _UndecodableError("no audio stream")
        stream = container.streams.audio[0]
        stream.codec_context.thread_count = 1
        sought = begin >= _SEEK_FROM and not _SEEKABLE.isdisjoint(container.format.name.split(","))
        if sought:
            container.seek(_time_stamp(stream, begin - _PREROLL), stream=stream)
        yield from _cut(_frames(container, stream), stream, begin, end, sought)


def _frames(container: Any, stream: Any) -> Iterator[Any]:
    """Decoded frames, all of one shape; a few broken packets are left out, as players do, but many are an error."""
    shape: tuple[int, str, int] | None = None
    good, faults = 0, list[Exception]()
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.error.FFmpegError as error:
            faults.append(error)
            continue
        for frame in frames:
            shape = shape or _shape(frame)
            if _shape(frame) == shape:
                good += 1
                yield frame
            else:  # junk in an MP3 file now and then looks like a frame
                faults.append(_UndecodableError("sample rate, sample format or channels change midway"))
    if len(faults) > _MAX_FAULTS * good:
        raise faults[0]


def _cut(frames: Iterator[Any], stream: Any, begin: float, end: float, sought: bool) -> Iterator[_Block]:
    """Cut frames to the stretch and join them to blocks."""
    head = next(frames, None)
    if head is None:
        return
    rate = head.sample_rate
    first, stop = _range(begin, end, rate)
    position = _position(head, stream) if sought else 0
    pending: list[NDArray[Any]] = []
    for frame in chain([head], frames):
        samples = _samples(frame)[:, max(0, first - position) : max(0, stop - position)]
        position += frame.samples
        if samples.shape[1]:
            pending.append(samples)
        if len(pending) == _BLOCK_FRAMES:
            yield rate, _joined(pending)
            pending = []
        if position >= stop:
            break
    if pending:
        yield rate, _joined(pending)


def _shape(frame: Any) -> tuple[int, str, int]:
    """Sample rate, sample format and number of channels of a frame."""
    return frame.sample_rate, frame.format.name, frame.layout.nb_channels


def _time_stamp(stream: Any, seconds: float) -> int:
    """Seconds from the stream's beginning in its own units."""
    return min(int(seconds / stream.time_base) + (stream.start_time or 0), _MAX_TIME_STAMP)


def _position(frame: Any, stream: Any) -> int:
    """A frame's place in samples from the stream's beginning, by its time stamp."""
    if frame.pts is None:
        raise _UndecodableError("no time stamps to find the stretch by")
    position: int = round((frame.pts - (stream.start_time or 0)) * stream.time_base * frame.sample_rate)
    return position


def _samples(frame: Any) -> NDArray[Any]:
    """A frame's samples [channels, samples] in their own type; a view (PyAV's own conversion takes 4 times as long)."""
    name, count = frame.format.name.removesuffix("p"), frame.layout.nb_channels
    dtype = {"u8": "u1", "s16": "i2", "s32": "i4", "s64": "i8", "flt": "f4", "dbl": "f8"}[name]
    if frame.format.is_planar:
        planes = [np.frombuffer(plane, dtype, count=frame.samples) for plane in frame.planes]
        return planes[0][np.newaxis] if count == 1 else np.stack(planes)
    return np.frombuffer(frame.planes[0], dtype, count=frame.samples * count).reshape(-1, count).T


def _joined(pieces: list[NDArray[Any]]) -> NDArray[np.float32]:
    """Pieces [channels, samples] of any sample type as one float32 block [samples, channels] of full scale 1."""
    block = np.concatenate(pieces, axis=1).T
    samples = block.astype(np.float32)
    if block.dtype.kind == "u":
        samples -= 128.0
    if block.dtype.kind in "iu":
        samples /= np.float32(2.0 ** (8 * block.dtype.itemsize - 1))
    return samples
