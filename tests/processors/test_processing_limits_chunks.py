"""Second part of the tests of `processing_limits`: files that hold their sound in one chunk, and count it wrong."""

import io
import struct

import numpy as np
import pytest
import soundfile

from chorus_moe.processors.processing_limits import MediaLimits, MediaPlace, _end_of_sound, decode_sound

NUM_SAMPLES = 16_000
SOUND = np.random.default_rng(0).uniform(-0.5, 0.5, NUM_SAMPLES).astype(np.float32)
# (container, name of the sound's chunk, format of its length, bytes from the name to the length, what it counts beside
# the samples).
KINDS = [("AIFF", b"SSND", ">I", 4, 8), ("W64", b"data", "<Q", 16, 24), ("CAF", b"data", ">Q", 4, 4)]


def saved(container: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, SOUND, 16_000, format=container, subtype="PCM_16")
    return file.getvalue()


def with_number(content: bytes, place: int, kind: str, number: int) -> bytes:
    changed = bytearray(content)
    struct.pack_into(kind, changed, place, number)
    return bytes(changed)


def with_length(content: bytes, name: bytes, kind: str, to_length: int, length: int) -> bytes:
    """The file with another length of its sound's chunk, and with no more frames in other chunks than that."""
    content = with_number(content, content.index(name) + to_length, kind, length)
    if name == b"SSND":
        return with_number(content, content.index(b"COMM") + 10, ">I", NUM_SAMPLES // 2)
    return content


def decode(content: bytes) -> np.ndarray:
    return decode_sound(content, MediaLimits(), 300.0, MediaPlace("audio", 0, sample=2))[0]


@pytest.mark.parametrize(("container", "name", "kind", "to_length", "beside"), KINDS, ids=[row[0] for row in KINDS])
class TestLengths:
    def test_a_file_that_counts_half_of_its_sound_is_heard_to_its_end(
        self, container, name, kind, to_length, beside, caplog
    ):
        healthy = saved(container)
        found = decode(with_length(healthy, name, kind, to_length, NUM_SAMPLES + beside))
        np.testing.assert_array_equal(found, soundfile.read(io.BytesIO(healthy), dtype="float32")[0])
        assert "sample 2, audio 0: the header counts less sound than the file holds" in caplog.text

    def test_a_recording_that_was_never_finished_is_heard(self, container, name, kind, to_length, beside, caplog):
        healthy = saved(container)
        for length in (0, beside, 2 ** (8 * struct.calcsize(kind)) - 1):
            found = decode(with_length(healthy, name, kind, to_length, length))
            np.testing.assert_array_equal(found[:NUM_SAMPLES], soundfile.read(io.BytesIO(healthy), dtype="float32")[0])
            assert len(found) == NUM_SAMPLES
        # CAF counts four bytes beside its samples that are no sound: there, four is a length.
        assert not caplog.records or container == "CAF"

    def test_a_file_that_is_cut_is_reported(self, container, name, kind, to_length, beside, caplog):
        healthy = saved(container)
        found = decode(healthy[: len(healthy) // 2])
        assert 0 < len(found) < NUM_SAMPLES
        assert f"the file is cut: {len(healthy) // 2} of {len(healthy)} bytes" in caplog.text


def test_a_w64_whose_fact_is_as_wrong_as_its_length_is_heard_to_its_end(caplog):
    healthy = saved("W64")
    start = healthy.index(b"data")
    fact = b"fact" + healthy[start + 4 : start + 16] + struct.pack("<QQ", 32, NUM_SAMPLES // 2)
    content = healthy[:start] + fact + healthy[start:]
    assert len(decode(content)) == NUM_SAMPLES and not caplog.records
    short = with_number(content, content.rindex(b"data") + 16, "<Q", NUM_SAMPLES + 24)
    np.testing.assert_array_equal(decode(short), decode(content))
    assert "the header counts less sound" in caplog.text


ANNOTATION = b"ANNO" + struct.pack(">I", 20) + b"words about the take"


@pytest.mark.parametrize("length", [None, 0, 8, NUM_SAMPLES + 8, 2 * NUM_SAMPLES + 8 + len(ANNOTATION), 2**32 - 1])
def test_what_an_aiff_holds_behind_its_sound_is_not_heard(length, caplog):
    healthy = saved("AIFF")
    content = with_number(healthy + ANNOTATION, 4, ">I", len(healthy + ANNOTATION) - 8)
    if length is not None:
        content = with_length(content, b"SSND", ">I", 4, length)
    np.testing.assert_array_equal(decode(content), decode(healthy))
    said = f"counts chunks behind the sound as sound; these {len(ANNOTATION)} bytes are left out"
    assert (said in caplog.text) == (length is not None)


class Counted(bytes):
    """Bytes that count how often they are looked at."""

    looks = 0

    def __getitem__(self, key):
        Counted.looks += 1
        return super().__getitem__(key)


def test_a_file_of_nothing_but_names_of_chunks_is_read_once():
    names = 500
    content = Counted(b"LIST\0\0\0\0" * names + b"\xff\xff\xff")
    assert _end_of_sound(content, 0, "little") == len(content)
    assert Counted.looks <= 4 * names
