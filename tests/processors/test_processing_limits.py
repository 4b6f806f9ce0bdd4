import base64
import dataclasses
import io
import re
import struct
import time
import zlib

import av
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from chorus_moe.processors.processing_limits import (
    MediaError,
    MediaLimits,
    MediaPlace,
    check_settings,
    decode_sound,
    load_image,
    num_pixels,
)
from tests.processors.conftest import picture, tone, wav_bytes

LIMITS = MediaLimits()
IMAGE, CLIP = MediaPlace("image", 1, sample=2), MediaPlace("audio", 0, sample=2)


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims any size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")
    )


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("side", [9_000, 19_000])
def test_a_huge_picture_of_few_bytes_is_refused_by_its_header(side):
    start = time.perf_counter()
    with pytest.raises(MediaError, match=r"sample 2, image 1: .*the limit is 64000000"):
        load_image(png_header(side, side), LIMITS, IMAGE)
    assert time.perf_counter() - start < 1.0


def test_a_truncated_picture_names_its_sample():
    with pytest.raises(MediaError, match=r"sample 2, image 1: broken or truncated") as caught:
        load_image(encoded(picture(200, 200))[:2000], LIMITS, IMAGE)
    assert (caught.value.sample, caught.value.modality) == (2, "image")


def test_an_animation_is_refused():
    frames = [picture(seed=seed) for seed in range(3)]
    with pytest.raises(MediaError, match="animated"):
        load_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), LIMITS, IMAGE)


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ("https://example.org/a.png", "never fetched"),
        ("no_such_file.png", "no such file"),
        (b"", "file is empty"),
        (b"not a picture", "not a readable image"),
        (np.zeros((2, 300)), "aspect ratio 150"),
        (np.zeros((0, 5)), "empty image"),
        (np.zeros((1, 2, 3, 4, 5)), "2 or 3 axes"),
        ({"width": 3}, "a dict needs"),
        (3.5, "found float"),
        ("data:image/png;base64,@@", "no valid base64"),
    ],
)
def test_a_bad_image_gets_one_clear_reason(item, reason):
    with pytest.raises(MediaError, match=rf"sample 2, image 1: .*{reason}"):
        load_image(item, LIMITS, IMAGE)


def test_bytes_paths_dicts_and_data_addresses_give_the_same_picture(tmp_path):
    content = encoded(picture())
    path = tmp_path / "a.png"
    path.write_bytes(content)
    address = "data:image/png;base64," + base64.b64encode(content).decode()
    files = (path, str(path), {"path": str(path)}, f"file://{path}", {"path": f"file://{path}"})
    # As programs write base64: lines of 76 letters.
    wrapped = "data:image/png;base64," + base64.encodebytes(content).decode()
    blank = tmp_path / "a b%20c.png"
    blank.write_bytes(content)
    for item in (content, *files, {"bytes": content, "path": None}, address, wrapped, str(blank), blank.as_uri()):
        assert np.array_equal(load_image(item, LIMITS, IMAGE), picture())


@pytest.mark.parametrize("kind", ["AVIF", "JPEG2000", "WEBP"])
def test_newer_formats_are_read_as_pillow_reads_them(kind):
    content = encoded(picture(32, 24), kind)
    assert np.array_equal(load_image(content, LIMITS, IMAGE), Image.open(io.BytesIO(content)))


def test_a_jpeg_of_thousands_of_scans_is_refused_before_it_is_decoded(tmp_path):
    content = encoded(picture(400, 400), "JPEG", progressive=True)
    assert load_image(content, LIMITS, IMAGE).size == (400, 400)
    start = content.rfind(b"\xff\xda")
    many = content[:start] + content[start:-2][:100] * 3_000 + content[-2:]
    (tmp_path / "a.jpg").write_bytes(many)
    for item in (many, tmp_path / "a.jpg"):
        with pytest.raises(MediaError, match=r"30\d\d scans in a JPEG, the limit is 64"):
            load_image(item, LIMITS, IMAGE)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_size_limit_knows_channels_first(channels):
    limits = MediaLimits(image_pixels=20 * 30)
    load_image(np.zeros((channels, 20, 30)), limits, IMAGE)
    load_image(np.zeros((20, 30, channels)), limits, IMAGE)
    for shape in ((channels, 20, 31), (20, 31, channels)):
        with pytest.raises(MediaError, match="31 x 20 = 620 pixels, the limit is 600"):
            load_image(np.zeros(shape), limits, IMAGE)


@pytest.mark.parametrize("bad", [0, 65_537, True, "400", float("nan"), float("inf"), [400, 0], {"height": 400.5e3}])
def test_a_setting_has_a_range_and_is_a_number(bad):
    for good in (1, 65_536, [1, 65_536], None, {"height": 7}):
        check_settings({"n_fft": good}, ("n_fft",))
    with pytest.raises(ValueError, match=r"n_fft=.*: expected finite numbers from 1 to 65536"):
        check_settings({"n_fft": bad}, ("n_fft",))
    # Others may be anything but numbers that are none.
    if bad != bad or bad == float("inf"):
        with pytest.raises(ValueError, match="finite numbers from -inf to inf"):
            check_settings({"other": bad}, ())
    else:
        check_settings({"other": bad}, ())


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pixels_are_counted_whatever_the_layout(channels):
    for shape in ((channels, 20, 30), (20, 30, channels)):
        assert num_pixels(np.zeros(shape)) == num_pixels(torch.zeros(shape)) == 600
    assert num_pixels(np.zeros((20, 30))) == num_pixels(Image.new("RGB", (30, 20))) == 600


def test_limits_are_those_of_the_documents():
    """A lower one refuses what was accepted, and a batch must not change those of the others."""
    assert (LIMITS.image_bytes, LIMITS.audio_bytes) == (67_108_864, 268_435_456)
    assert (LIMITS.image_pixels, LIMITS.sample_pixels, LIMITS.image_aspect_ratio) == (64 * 10**6, 256 * 10**6, 100)
    assert (LIMITS.images_per_sample, LIMITS.clips_per_sample, LIMITS.audio_channels) == (64, 64, 8)
    assert (LIMITS.audio_min_rate, LIMITS.audio_max_rate, LIMITS.sample_seconds) == (1_000, 768_000, 3_600)
    for frozen in (LIMITS, IMAGE):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(frozen, dataclasses.fields(frozen)[0].name, 10**12)


def test_file_size_is_checked_before_decoding():
    with pytest.raises(MediaError, match="bytes, the limit is 10"):
        load_image(encoded(picture()), MediaLimits(image_bytes=10), IMAGE)


def test_a_phone_picture_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert load_image(encoded(picture(9, 6), "JPEG", exif=exif), LIMITS, IMAGE).size == (6, 9)


def test_a_wav_that_claims_four_gigabytes_is_read_no_further_than_it_goes():
    content = bytearray(wav_bytes(tone(0.1)))
    content[4:8] = content[40:44] = b"\xff\xff\xff\xff"
    start = time.perf_counter()
    samples, rate = decode_sound(bytes(content), LIMITS, 300.0, CLIP)
    assert time.perf_counter() - start < 1.0
    assert (len(samples), rate) == (1600, 16_000)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (wav_bytes(tone(0.2), 100), "sampling rate 100 is outside"),
        (wav_bytes(tone(0.2), 10**6), "sampling rate 1000000 is outside"),
        (wav_bytes(np.ones((50, 9), dtype=np.float32)), "9 channels, the limit is 8"),
        (wav_bytes(tone(3.0)), "3.00 seconds, the limit max_audio_seconds is 2"),
        (wav_bytes(tone(0.1)[:0]), "empty clip"),
        (b"RIFFnonsense", "no readable sound of the formats"),
    ],
)
def test_a_bad_sound_file_gets_one_clear_reason(content, reason):
    with pytest.raises(MediaError, match=rf"sample 2, audio 0: .*{reason}"):
        decode_sound(content, LIMITS, 2.0, CLIP)


def sound_file(samples: np.ndarray, rate: int = 16_000, **options) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, **options)
    return buffer.getvalue()


def muxed(container: str, codec: str, with_picture: bool = False) -> bytes:
    """Three seconds of a tone in a container that soundfile does not write."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        video = output.add_stream("mpeg4", rate=5) if with_picture else None
        sound = output.add_stream(codec, rate=16_000, layout="mono")
        if video is not None:
            video.width = video.height = 64
            video.pix_fmt = "yuv420p"
            pictures = [av.VideoFrame.from_ndarray(np.full((64, 64, 3), 10 * i, np.uint8)) for i in range(15)]
            output.mux([packet for frame in [*pictures, None] for packet in video.encode(frame)])
        frame = av.AudioFrame.from_ndarray(0.5 * tone(3.0)[None], format="fltp", layout="mono")
        frame.sample_rate = 16_000
        output.mux([packet for item in (frame, None) for packet in sound.encode(item)])
    return buffer.getvalue()


NOISE = (0.2 * np.random.default_rng(0).normal(size=(100_003, 2))).clip(-1, 1).astype(np.float32)


@pytest.mark.parametrize("rate", [8_000, 44_100])
@pytest.mark.parametrize("num_samples", [100, 10_007, 100_003])
@pytest.mark.parametrize(
    ("container", "subtype"),
    [
        ("WAV", "PCM_U8"), ("WAV", "PCM_16"), ("WAV", "PCM_24"), ("WAV", "FLOAT"), ("WAV", "DOUBLE"), ("WAV", "ULAW"),
        ("FLAC", "PCM_16"), ("FLAC", "PCM_24"), ("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III"), ("CAF", "ALAC_16"),
        ("AIFF", "PCM_16"), ("AU", "PCM_16"), ("W64", "PCM_16"),
    ],
)  # fmt: skip
def test_a_healthy_file_is_decoded_as_soundfile_decodes_it(container, subtype, num_samples, rate, caplog):
    content = sound_file(NOISE[:num_samples], rate, format=container, subtype=subtype)
    expected, _ = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    found, found_rate = decode_sound(content, LIMITS, 300.0, CLIP)
    assert (found.shape, found.dtype, found_rate) == ((num_samples,), np.float32, rate)
    # Two decoders of MP3 and Vorbis; the others agree in every bit.
    np.testing.assert_allclose(found, expected.mean(axis=1), atol=1e-5)
    assert not caplog.records


@pytest.mark.parametrize(
    ("container", "codec", "with_picture"),
    [("ipod", "aac", False), ("mp4", "aac", True), ("adts", "aac", False), ("mov", "pcm_s16le", True),
     ("mp4", "alac", True), ("matroska", "aac", True)],
)  # fmt: skip
def test_m4a_and_the_sound_of_a_video_are_heard(container, codec, with_picture, caplog):
    samples, rate = decode_sound(muxed(container, codec, with_picture), LIMITS, 300.0, CLIP)
    # AAC comes in blocks of 1024.
    assert rate == 16_000 and 48_000 <= len(samples) <= 48_000 + 1_152
    loudest = np.abs(np.fft.rfft(samples[:48_000])).argmax()
    assert loudest == 440 * 3
    assert not caplog.records


def streamed_flac(samples: np.ndarray) -> bytes:
    """The header of a stream: 36 bits for the number of samples and the checksum are zero."""
    content = bytearray(sound_file(samples, format="FLAC"))
    content[21] &= 0xF0
    content[22:42] = bytes(20)
    return bytes(content)


def headless_mp3(samples: np.ndarray) -> bytes:
    """Variable rate without LAME's first frame, which tells the length."""
    content = sound_file(samples, format="MP3", bitrate_mode="VARIABLE", compression_level=0.5)
    return content[content.index(b"\xff\xf3", 200) :]


# A quiet second first: a rate guessed from it is far too low.
PIECES = tuple((level * NOISE[:16_000, 0]).astype(np.float32) for level in (0.01, 1.0))


@pytest.mark.parametrize(
    "content",
    [
        streamed_flac(np.concatenate(PIECES)),
        headless_mp3(np.concatenate(PIECES)),
        b"".join(sound_file(piece, format="MP3") for piece in PIECES),
        b"".join(sound_file(piece, format="OGG") for piece in PIECES),
    ],
    ids=["flac", "vbr", "joined", "chained"],
)
def test_a_file_is_heard_to_its_end_whatever_its_header_says(content):
    samples, rate = decode_sound(content, LIMITS, 300.0, CLIP)
    # Joints and ends are padded.
    assert 2 * rate <= len(samples) < 2.15 * rate
    # Both pieces are there: the second is a hundred times louder.
    assert np.abs(samples[:12_000]).max() < 0.02 < 0.1 < np.abs(samples[-12_000:]).std()


def test_each_piece_of_a_chained_file_is_what_it_is_alone():
    files = [sound_file(piece, format="OGG") for piece in PIECES]
    first, second = (soundfile.read(io.BytesIO(content), dtype="float32")[0] for content in files)
    found, _ = decode_sound(b"".join(files), LIMITS, 300.0, CLIP)
    np.testing.assert_allclose(found[: len(first)], first, atol=1e-5)
    # Where the second begins, which a block of padding puts off.
    gaps = [np.abs(found[start : start + 12_000] - second[1_000:13_000]).max() for start in range(17_000, 18_500)]
    assert min(gaps) < 1e-5


def test_what_is_missing_is_reported(caplog):
    healthy = {kind: sound_file(NOISE[:48_000], format=kind) for kind in ("WAV", "FLAC", "MP3")}
    damaged = bytearray(healthy["FLAC"])
    damaged[100_000:100_200] = bytes(200)
    for content, report in (
        (healthy["WAV"][:60_000], "the file is cut: 60000 of 192044 bytes"),
        (healthy["FLAC"][:60_000], "of 3.00 seconds"),
        (healthy["MP3"][: len(healthy["MP3"]) // 2], "of 3.00 seconds"),
        (bytes(damaged), "of 3.00 seconds"),
    ):
        caplog.clear()
        samples, _ = decode_sound(content, LIMITS, 300.0, CLIP)
        assert 0 < len(samples) < 48_000
        assert "sample 2, audio 0: " in caplog.text and report in caplog.text


@pytest.mark.parametrize("kind", ["WAV", "AIFF", "FLAC"])
def test_files_joined_that_cannot_be_are_reported(kind, caplog):
    alone = sound_file(NOISE[:16_000], format=kind)
    assert len(decode_sound(alone, LIMITS, 300.0, CLIP)[0]) == 16_000 and not caplog.records
    samples, _ = decode_sound(alone * 2, LIMITS, 300.0, CLIP)
    assert 16_000 <= len(samples) < 32_000
    report = "of 1.00 seconds" if kind == "FLAC" else f"the first is read: {len(alone)} of {2 * len(alone)} bytes"
    assert "sample 2, audio 0: " in caplog.text and report in caplog.text


@pytest.mark.parametrize("size", [b"\x00\x00\x00\x00", b"\xff\xff\xff\xff"])
def test_a_streamed_wav_has_no_size_and_is_heard(size, caplog):
    content = bytearray(wav_bytes(tone(0.1)))
    content[4:8] = content[40:44] = size
    samples, _ = decode_sound(bytes(content), LIMITS, 300.0, CLIP)
    assert len(samples) == 1_600 and not caplog.records


def with_sizes(content: bytes, data: int, riff: int | None = None) -> bytes:
    """The WAV file with other lengths in its header."""
    changed, place = bytearray(content), content.index(b"data") + 4
    changed[place : place + 4] = struct.pack("<I", data)
    changed[4:8] = changed[4:8] if riff is None else struct.pack("<I", riff)
    return bytes(changed)


LIST = b"LIST" + struct.pack("<I", 12) + b"INFOISFT\0\0\0\0"


@pytest.mark.parametrize("riff", [None, 0, 2**32 - 1, 24_036])
@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_U8", "FLOAT", "ULAW"])
def test_a_wav_that_counts_too_little_sound_is_heard_to_its_end(subtype, riff, caplog):
    content = wav_bytes(tone(3.0), subtype=subtype)
    found, _ = decode_sound(with_sizes(content, 24_000, riff), LIMITS, 300.0, CLIP)
    # libsndfile writes a chunk of peaks into files of floats, in front of the sound.
    np.testing.assert_array_equal(found, decode_sound(content, LIMITS, 300.0, CLIP)[0])
    assert len(found) == 48_000 and "sample 2, audio 0: the header counts less sound" in caplog.text


def test_an_rf64_that_counts_too_little_sound_is_heard_to_its_end(caplog):
    content = bytearray(sound_file(tone(3.0), format="RF64", subtype="PCM_16"))
    assert len(decode_sound(bytes(content), LIMITS, 300.0, CLIP)[0]) == 48_000 and not caplog.records
    place = content.index(b"ds64") + 16
    content[place : place + 8] = struct.pack("<Q", 48_000)
    assert len(decode_sound(bytes(content), LIMITS, 300.0, CLIP)[0]) == 48_000
    assert "the header counts less sound" in caplog.text


@pytest.mark.parametrize("num_samples", [4_801, 4_802])
@pytest.mark.parametrize("tail", [LIST, b"\0" + LIST, LIST + LIST, bytes(512), b"ends"])
def test_what_a_wav_holds_behind_its_sound_is_not_heard(tail, num_samples, caplog):
    content = wav_bytes(tone(3.0)[:num_samples], subtype="PCM_U8").removesuffix(b"\0")
    content = content[: content.index(b"data") + 8 + num_samples] + tail
    found, _ = decode_sound(with_sizes(content, num_samples, len(content) - 8), LIMITS, 300.0, CLIP)
    assert len(found) == num_samples and not caplog.records


ID3 = b"id3 " + struct.pack("<I", 16) + b"ID3\4\0\0\0\0\0\6TIT2\0\0"
BEXT = b"bext" + struct.pack("<I", 5) + b"title\0"


@pytest.mark.parametrize("tail", [LIST, ID3, BEXT + LIST, LIST + ID3, LIST + BEXT.removesuffix(b"\0")])
@pytest.mark.parametrize(
    "counted",
    [lambda size, tail: size + tail, lambda size, tail: size + 9, lambda size, tail: size + 10_000,
     lambda size, tail: 2**32 - 1, lambda size, tail: 0, lambda size, tail: size // 2],
    ids=["to the end", "into the chunk", "beyond the end", "unknown", "nothing", "half"],
)  # fmt: skip
def test_chunks_that_a_wav_counts_as_sound_are_not_heard(tail, counted, caplog):
    content = wav_bytes(NOISE[:8_000, 0])
    size = len(content) - content.index(b"data") - 8
    found, _ = decode_sound(with_sizes(content + tail, counted(size, len(tail)), 0), LIMITS, 300.0, CLIP)
    np.testing.assert_array_equal(found, decode_sound(content, LIMITS, 300.0, CLIP)[0])
    assert f"counts chunks behind the sound as sound; these {len(tail)} bytes are left out" in caplog.text


@pytest.mark.parametrize("word", [b"LIST", b"id3 \x08\0\0\0", LIST + b"abc", LIST[:-1] + b"abcdefghi"])
def test_sound_that_looks_like_a_chunk_is_heard(word, caplog):
    content = wav_bytes(NOISE[:8_000, 0])
    spoken = content[:8_000] + word + content[8_000 + len(word) :]
    counted = with_sizes(spoken, 2**32 - 1, 0)
    found, _ = decode_sound(counted, LIMITS, 300.0, CLIP)
    np.testing.assert_array_equal(found, decode_sound(spoken, LIMITS, 300.0, CLIP)[0])
    assert len(found) == 8_000 and not caplog.records


def ogg_checksum(page: bytes) -> int:
    value = 0
    for byte in page:
        value ^= byte << 24
        for _ in range(8):
            value = (value << 1 ^ (0x04C11DB7 if value >> 31 else 0)) & 0xFFFFFFFF
    return value


def with_last_granule(content: bytes, factor: float) -> bytes:
    """An Ogg file whose last page says that the sound ends earlier."""
    start = content.rindex(b"OggS")
    page = bytearray(content[start:])
    page[6:14] = struct.pack("<q", int(struct.unpack("<q", page[6:14])[0] * factor))
    page[22:26] = bytes(4)
    page[22:26] = struct.pack("<I", ogg_checksum(bytes(page)))
    return content[:start] + bytes(page)


def with_granules(content: bytes, factor: float) -> bytes:
    """An Ogg file whose pages all say that they end at another time."""
    changed = b""
    for piece in content.split(b"OggS")[1:]:
        page = bytearray(b"OggS" + piece)
        page[6:14] = struct.pack("<q", int(struct.unpack("<q", page[6:14])[0] * factor))
        page[22:26] = bytes(4)
        page[22:26] = struct.pack("<I", ogg_checksum(bytes(page)))
        changed += bytes(page)
    return changed


@pytest.mark.parametrize("seconds", [1.2, 3.0, 6.0])
def test_opus_that_loses_sound_by_its_granules_is_reported(seconds, caplog):
    opus = sound_file(tone(seconds), format="OGG", subtype="OPUS")
    samples, rate = decode_sound(with_granules(opus, 1.0), LIMITS, 300.0, CLIP)
    assert len(samples) == round(seconds * rate) and not caplog.records
    for factor in (0.9, 0.5):
        caplog.clear()
        samples, rate = decode_sound(with_granules(opus, factor), LIMITS, 300.0, CLIP)
        lost = seconds - len(samples) / rate
        assert lost < 0.04 or re.search(r"audio 0: decoded \d\.\d+ of \d\.\d+ seconds, 0 broken", caplog.text)
    # The last half of the last second is lost, of which half a second is allowed to codecs that do not count.
    assert lost > 0.04


def with_edit(content: bytes, factor: float) -> bytes:
    """An MP4 file whose edit list plays a part of the sound."""
    changed, place = bytearray(content), content.index(b"elst") + 12
    changed[place : place + 4] = struct.pack(">I", int(struct.unpack(">I", content[place : place + 4])[0] * factor))
    return bytes(changed)


def test_sound_that_a_container_leaves_out_is_reported(caplog):
    opus = sound_file(tone(3.0), format="OGG", subtype="OPUS")
    aac, alac = muxed("mp4", "aac"), muxed("mp4", "alac")
    for content in (with_last_granule(opus, 1.0), with_edit(aac, 1.0), with_edit(alac, 1.0)):
        assert len(decode_sound(content, LIMITS, 300.0, CLIP)[0]) >= 48_000 and not caplog.records
    for content in (with_last_granule(opus, 0.5), with_edit(aac, 0.5), with_edit(alac, 0.5)):
        caplog.clear()
        samples, rate = decode_sound(content, LIMITS, 300.0, CLIP)
        assert len(samples) < 2 * rate
        assert re.search(r"sample 2, audio 0: decoded 1\.\d+ of 3\.\d+ seconds", caplog.text)
    # Nor is anything lost in a file that counts too little elsewhere.
    flac = bytearray(sound_file(tone(3.0), format="FLAC"))
    flac[22:26] = struct.pack(">I", 24_000)
    vorbis = sound_file(tone(3.0), format="OGG", subtype="VORBIS")
    for content in (bytes(flac), with_last_granule(vorbis, 0.5)):
        assert len(decode_sound(content, LIMITS, 300.0, CLIP)[0]) >= 48_000


@pytest.mark.parametrize(
    "content",
    [
        b"ffconcat version 1.0\nfile 'secret.wav'\n",
        b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.wav\n",
        b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=audio 5004 RTP/AVP 0\n",
    ],
)
def test_a_playlist_opens_no_other_file(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.wav").write_bytes(wav_bytes(tone(0.1)))
    (tmp_path / "list").write_bytes(content)
    for item in (content, tmp_path / "list"):
        with pytest.raises(MediaError, match="no readable sound"):
            decode_sound(item, LIMITS, 300.0, CLIP)
