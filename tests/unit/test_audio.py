"""Reading audio: every container and oddity ends as mono float32, or as an error that names what is wrong."""

from __future__ import annotations

import csv
import os
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from embstore.errors import ItemFailed
from embstore.media import audio, extensions

DATA = Path(os.environ.get("EMBSTORE_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
ODD = DATA / "odd-audio"
EXPECTED = list(csv.DictReader((ODD / "expected.csv").open(encoding="utf-8"))) if ODD.is_dir() else []
needs_data = pytest.mark.skipif(not EXPECTED, reason=f"no test data in {DATA}")

TONE = 440.0


def tone(seconds: float, rate: int, channels: int = 1) -> NDArray[np.float32]:
    wave = 0.5 * np.sin(2 * np.pi * TONE * np.arange(round(seconds * rate)) / rate)
    return np.repeat(wave[:, np.newaxis], channels, axis=1).astype(np.float32)


def babble(seconds: float, rate: int) -> NDArray[np.float32]:
    """A sweep whose every moment differs from every other, so that a wrong place can't pass for the right one."""
    time = np.arange(round(seconds * rate)) / rate
    return (0.4 * np.sin(2 * np.pi * (200 + 30 * time) * time)[:, np.newaxis]).astype(np.float32)


def encode(path: Path, codec: str, rate: int, samples: NDArray[np.float32], **options: Any) -> Path:
    """Encode [n, channels] with FFmpeg."""
    layout = "mono" if samples.shape[1] == 1 else "stereo"
    with av.open(str(path), "w", **options) as container:
        stream: Any = container.add_stream(codec, rate=rate, layout=layout)
        stream.bit_rate = 12200 if "amr" in codec else 96000
        resampler = av.AudioResampler(format=stream.format, layout=layout, rate=rate)
        for start in range(0, len(samples), 1024):
            piece = np.ascontiguousarray(samples[start : start + 1024].T)
            frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout=layout)
            frame.sample_rate, frame.pts = rate, start
            for converted in resampler.resample(frame):
                container.mux(stream.encode(converted))
        container.mux(stream.encode(None))
    return path


def code_of(path: Path, start: float | None = None, duration: float | None = None) -> str:
    with pytest.raises(ItemFailed) as caught:
        audio.read(path, start, duration, 16000)
    assert "\n" not in caught.value.detail
    return caught.value.code


@needs_data
@pytest.mark.parametrize("row", EXPECTED, ids=lambda row: row["path"])
def test_odd_file(row: dict[str, str], capfd: pytest.CaptureFixture[str]) -> None:
    path = ODD / row["path"]
    if row["expectation"] == "error":
        assert code_of(path) in {"decode_error", "empty_audio"}
    else:
        sound = audio.read(path, None, None, 16000)
        lengths = {"very_short_30ms.wav": 0.03, "digital_silence_2s.wav": 2.0, "truncated_data_half.wav": 1.882}
        assert sound.seconds == pytest.approx(lengths.get(path.name, 3.765), abs=0.08)
        assert len(sound.samples) == pytest.approx(sound.seconds * 16000, abs=2)
        assert sound.samples.dtype == np.float32
        assert np.isfinite(sound.samples).all()
        assert np.abs(sound.samples).max() <= 1.01
    assert capfd.readouterr().err == ""


@needs_data
def test_decoders_words_are_kept() -> None:
    with pytest.raises(ItemFailed, match=r"libsndfile: Format not recognised.*ffmpeg: Invalid data found"):
        audio.read(ODD / "text_named_wav.wav", None, None, 16000)


SOUNDFILE_FORMATS = [
    ("eight_bit.wav", "PCM_U8", 16000, 1),
    ("studio.wav", "PCM_24", 192000, 1),
    ("array.wav", "PCM_16", 16000, 8),
    ("double.wav", "DOUBLE", 44100, 2),
    ("alaw.wav", "ALAW", 8000, 1),
    ("adpcm.wav", "IMA_ADPCM", 22050, 1),
    ("long.w64", "PCM_16", 16000, 1),
    ("apple.caf", "PCM_16", 48000, 2),
    ("sun.au", "PCM_16", 16000, 1),
    ("sphere.sph", "PCM_16", 8000, 1),
    ("large.rf64", "PCM_16", 16000, 1),
    ("music.flac", "PCM_16", 96000, 6),
    ("speech.ogg", "OPUS", 48000, 2),
    ("speech.mp3", "MPEG_LAYER_III", 32000, 2),
]
FFMPEG_FORMATS = [
    ("windows.wma", "wmav2", 44100, 2),
    ("phone.amr", "libopencore_amrnb", 8000, 1),
    ("phone.3gp", "libopencore_amrnb", 8000, 1),
    ("browser.webm", "libopus", 48000, 1),
    ("browser.mka", "flac", 16000, 1),
    ("apple.m4a", "aac", 44100, 2),
    ("lossless.m4a", "alac", 44100, 2),
    ("raw.aac", "aac", 16000, 1),
    ("movie.mp4", "libmp3lame", 44100, 1),
    ("old.wav", "adpcm_ms", 16000, 1),
    ("pack.wv", "wavpack", 16000, 2),
]


def check_tone(path: Path, rate: int) -> None:
    sound = audio.read(path, None, None, rate)
    assert sound.seconds == pytest.approx(2.0, abs=0.15)
    middle = sound.samples[rate // 2 : rate // 2 + rate]
    assert np.argmax(np.abs(np.fft.rfft(middle))) == pytest.approx(TONE, abs=1)
    assert np.sqrt(np.mean(middle**2)) == pytest.approx(0.5 / np.sqrt(2), rel=0.2)


@pytest.mark.parametrize(("name", "subtype", "rate", "channels"), SOUNDFILE_FORMATS, ids=lambda v: str(v))
def test_formats_of_libsndfile(tmp_path: Path, name: str, subtype: str, rate: int, channels: int) -> None:
    path = tmp_path / name
    kind = {".sph": "NIST", ".rf64": "RF64"}.get(path.suffix)
    soundfile.write(path, tone(2, rate, channels), rate, subtype=subtype, format=kind)
    check_tone(path, 16000)
    assert path.suffix in extensions.AUDIO


@pytest.mark.parametrize(("name", "codec", "rate", "channels"), FFMPEG_FORMATS, ids=lambda v: str(v))
def test_formats_of_ffmpeg(tmp_path: Path, name: str, codec: str, rate: int, channels: int) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"this build of FFmpeg has no {codec}")
    check_tone(encode(tmp_path / name, codec, rate, tone(2, rate, channels)), 16000)
    assert (tmp_path / name).suffix in extensions.AUDIO


def test_a_rate_below_and_above_the_file(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(2, 16000), 16000)
    for rate in (8000, 16000, 44100):
        check_tone(tmp_path / "a.wav", rate)


STRETCHES = [(0.0, 1.0), (0.3, 0.5), (5.25, 1.0), (17.123, 2.0), (28.9, 1.0)]


@pytest.mark.parametrize(
    ("name", "codec", "rate"),
    [
        ("a.wav", None, 16000),
        ("a.flac", None, 44100),
        ("a.ogg", None, 16000),
        ("a.mp3", "libmp3lame", 44100),
        ("a.m4a", "aac", 44100),
        ("a.aac", "aac", 16000),
        ("a.webm", "libopus", 48000),
        ("a.wma", "wmav2", 44100),
        ("a.amr", "libopencore_amrnb", 8000),
    ],
)
def test_a_stretch_is_that_part_of_the_whole(tmp_path: Path, name: str, codec: str | None, rate: int) -> None:
    path = tmp_path / name
    if codec is None:
        soundfile.write(path, babble(30, rate), rate)
    elif codec in av.codecs_available:
        encode(path, codec, rate, babble(30, rate))
    else:
        pytest.skip(f"this build of FFmpeg has no {codec}")
    whole = audio.read(path, None, None, rate).samples
    # Time stamps of these containers are whole milliseconds.
    slack = rate // 1000 if path.suffix in {".webm", ".wma"} else 0
    for start, duration in STRETCHES:
        part = audio.read(path, start, duration, rate)
        first = round(start * rate)
        assert len(part.samples) == pytest.approx(duration * rate, abs=1)
        assert part.seconds == pytest.approx(duration, abs=1e-3)
        errors = [
            np.abs(part.samples - whole[first + shift : first + shift + len(part.samples)]).max()
            for shift in range(-min(slack, first), slack + 1)
        ]
        assert min(errors) < 0.01, (start, duration)


def test_neighbouring_stretches_meet(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", babble(2, 44100), 44100)
    whole = audio.read(tmp_path / "a.flac", None, None, 44100).samples
    parts = [audio.read(tmp_path / "a.flac", i * 0.1, 0.1, 44100).samples for i in range(20)]
    assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("name", ["a.wav", "a.mp3"])
def test_a_stretch_over_the_end_gives_what_is_there(tmp_path: Path, name: str) -> None:
    soundfile.write(tmp_path / name, tone(2, 16000), 16000)
    assert audio.read(tmp_path / name, 1.5, 10, 16000).seconds == pytest.approx(0.5, abs=0.1)
    assert audio.read(tmp_path / name, 1.5, None, 16000).seconds == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("name", ["a.wav", "a.mp3"])
@pytest.mark.parametrize(
    ("start", "duration"), [(3.0, 1.0), (300.0, None), (1e12, 1.0), (-1.0, 2.0), (0.0, 0.0), (0.0, -1.0)]
)
def test_a_stretch_out_of_range(tmp_path: Path, name: str, start: float, duration: float | None) -> None:
    soundfile.write(tmp_path / name, tone(2, 16000), 16000)
    assert code_of(tmp_path / name, start, duration) == "out_of_range"


@pytest.mark.parametrize(("start", "duration"), [(float("nan"), 1.0), (float("inf"), None), (0.0, float("nan"))])
def test_a_stretch_that_is_no_number(tmp_path: Path, start: float, duration: float | None) -> None:
    soundfile.write(tmp_path / "a.wav", tone(1, 16000), 16000)
    assert code_of(tmp_path / "a.wav", start, duration) == "out_of_range"


def test_memory_follows_the_stretch(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "hour.wav", np.zeros((60 * 48000, 2), np.int16), 48000)
    tracemalloc.start()
    try:
        audio.read(tmp_path / "hour.wav", 30, 1, 16000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3e6


def test_first_channel_or_mean(tmp_path: Path) -> None:
    left, right = tone(1, 16000), np.zeros((16000, 1), np.float32)
    for name in ("a.wav", "a.m4a"):
        path = tmp_path / name
        both = np.hstack([left, right])
        encode(path, "pcm_s16le" if name == "a.wav" else "alac", 16000, both)
        assert np.allclose(audio.read(path, None, None, 16000, "first").samples, left[:, 0], atol=1e-3)
        assert np.allclose(audio.read(path, None, None, 16000).samples, left[:, 0] / 2, atol=1e-3)


def test_integers_reach_full_scale_in_both_decoders(tmp_path: Path) -> None:
    extremes = np.array([[-32768], [32767], [0], [16384]] * 500, np.int16)
    soundfile.write(tmp_path / "a.wav", extremes, 16000)
    encode(tmp_path / "a.m4a", "alac", 16000, extremes.astype(np.float32) / np.float32(32768))
    for name in ("a.wav", "a.m4a"):
        samples = audio.read(tmp_path / name, None, None, 16000).samples
        assert np.allclose(samples[:4], [-1, 32767 / 32768, 0, 0.5])


def test_names_that_are_no_names_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("http:x.m4a", "a b%d#?.m4a", "-i.m4a", "名 ü.m4a", os.fsdecode(b"\xff\xe9.m4a")):
        encode(tmp_path / "plain.m4a", "aac", 16000, tone(1, 16000)).rename(name)
        assert audio.read(Path(name), None, None, 16000).seconds == pytest.approx(1, abs=0.1)


def test_tags_in_an_old_encoding(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp3", "libmp3lame", 16000, tone(1, 16000))
    title = b"\x00" + "fa\u00e7ade".encode("latin-1") + b"\xff\xfe"
    frame = b"TIT2" + len(title).to_bytes(4, "big") + b"\0\0" + title
    path.write_bytes(b"ID3\x03\0\0" + bytes([0, 0, 0, len(frame)]) + frame + path.read_bytes())
    assert audio.read(path, None, None, 16000).seconds == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("damage", ["middle", "tail", "cut"])
def test_a_damaged_mp3_gives_the_rest_without_noise(
    tmp_path: Path, damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.mp3"
    soundfile.write(path, babble(10, 16000), 16000)
    good, junk = path.read_bytes(), np.random.default_rng(1).bytes(3000)
    half = len(good) // 2
    path.write_bytes({"middle": good[:half] + junk + good[half:], "tail": good + junk, "cut": good[:half]}[damage])
    sound = audio.read(path, None, None, 16000)
    assert sound.seconds == pytest.approx(5 if damage == "cut" else 10, abs=1.5)
    assert capfd.readouterr().err == ""


def test_missing_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    assert code_of(tmp_path / "none.wav") == "not_found"
    assert code_of(tmp_path / "file" / "none.wav") == "not_found"


def test_not_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.wav")
    assert code_of(tmp_path / "pipe.wav") == "not_a_file"
    assert code_of(tmp_path) == "is_a_directory"


def test_no_permission(tmp_path: Path) -> None:
    path = tmp_path / "secret.wav"
    soundfile.write(path, tone(1, 16000), 16000)
    path.chmod(0)
    if os.geteuid() != 0:
        assert code_of(path) == "no_permission"
        return
    os.seteuid(65534)
    try:
        assert code_of(path) == "no_permission"
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite(tmp_path: Path, value: float) -> None:
    samples = tone(1, 16000, channels=2)
    samples[5000, 1] = value
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    assert code_of(tmp_path / "a.wav") == "not_finite"
    assert audio.read(tmp_path / "a.wav", None, None, 16000, "first").seconds == 1


def test_not_finite_although_two_channels_cancel(tmp_path: Path) -> None:
    samples = tone(1, 16000, channels=2)
    samples[5000] = np.inf, -np.inf
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    assert code_of(tmp_path / "a.wav") == "not_finite"


def test_a_playlist_opens_no_other_file(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "other.wav", tone(1, 16000), 16000)
    (tmp_path / "a.m4a").write_text("ffconcat version 1.0\nfile other.wav\n")
    (tmp_path / "b.m4a").write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{tmp_path}/other.wav\n#EXT-X-ENDLIST\n"
    )
    assert code_of(tmp_path / "a.m4a") == "decode_error"
    assert code_of(tmp_path / "b.m4a") == "decode_error"


def test_a_film_without_sound(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(ItemFailed, match="no audio stream"):
        audio.read(tmp_path / "a.mp4", None, None, 16000)


@needs_data
def test_threads_read_what_one_reads() -> None:
    paths = [ODD / row["path"] for row in EXPECTED if row["expectation"] == "ok"]
    alone = [audio.read(path, None, None, 16000).samples for path in paths]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda path: audio.read(path, None, None, 16000).samples, paths * 4))
    for one, other in zip(alone * 4, together, strict=True):
        assert np.array_equal(one, other)
