"""Engine room a3: blocks and files against the package `gguf`, both ways, and files that lie."""
import struct
import tracemalloc

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Types
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from llm_book.gguf import KINDS, GGUFFile, quantise_q8_0, write_gguf


def random_blocks(kind: str, rows: int, seed: int = 0) -> np.ndarray:
    """Bytes of two blocks in each row: every byte can occur, in scales too (also inf and nan)."""
    width = 2 * KINDS[kind].nbytes
    return np.random.default_rng(seed).integers(0, 256, (rows, width)).astype(np.uint8)


def writer(path, **options):
    return gguf.GGUFWriter(path, "llama", **options)


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---- blocks

@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_those_of_the_package(kind):
    """Zero difference, on every kind of byte."""
    blocks = random_blocks(kind, 500)
    with np.errstate(all="ignore"):
        theirs = gguf.dequantize(blocks, Types[kind])
        ours = KINDS[kind].decode(blocks.reshape(-1, KINDS[kind].nbytes))
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours.ravel(), theirs.ravel())
    assert np.isfinite(ours).mean() > 0.5


def test_the_table_of_kinds_is_right():
    for name, kind in KINDS.items():
        assert kind.number == Types[name]
        assert (kind.size, kind.nbytes) == gguf.GGML_QUANT_SIZES[Types[name]]


@given(arrays(np.float32, (3, 32), elements=st.floats(-1e6, 1e6, width=32)))
def test_no_number_moves_by_more_than_the_bound(numbers):
    scale = np.abs(numbers).max(1, keepdims=True) / 127
    back = KINDS["Q8_0"].decode(quantise_q8_0(numbers))
    bound = (0.5 + 127 / 2048) * scale * (1 + 1e-5)
    bound = np.where(scale < 2**-14, 0.5 * scale + 127 * 2.0**-25, bound)  # 16 bits with fewer digits
    assert (np.abs(back - numbers) <= bound).all()


def test_blocks_that_are_written_are_those_of_the_package():
    numbers = np.random.default_rng(0).normal(size=(500, 32)).astype(np.float32)
    numbers[0] = 0
    ours, theirs = quantise_q8_0(numbers), gguf.quantize(numbers, Types.Q8_0)
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, 1e8])
def test_numbers_that_do_not_fit_are_refused(bad, tmp_path):
    weight = torch.zeros(2, 32)
    weight[1, 3] = bad
    for kind in ("Q8_0", "F16"):
        with pytest.raises(ValueError, match="weights must be finite"):
            write_gguf(tmp_path / "x.gguf", {}, {"a": weight}, kind)
    assert not list(tmp_path.iterdir())
    write_gguf(tmp_path / "x.gguf", {}, {"a": weight}, "F32")
    assert torch.equal(GGUFFile(tmp_path / "x.gguf")["a"].nan_to_num(7), weight.nan_to_num(7))


# ---- files of the package

def test_we_read_what_the_package_writes(tmp_path):
    theirs, content = writer(tmp_path / "x.gguf"), {}
    for kind in KINDS:
        content[kind] = random_blocks(kind, 3)
        raw = content[kind].view(np.float32) if kind == "F32" else content[kind].view(np.float16) if kind == "F16" else content[kind]
        theirs.add_tensor(kind, raw, raw_dtype=Types[kind])
    finish(theirs)
    file = GGUFFile(tmp_path / "x.gguf")
    assert list(file) == list(KINDS) and len(file) == len(KINDS) and "none" not in file
    with np.errstate(all="ignore"):
        for kind in KINDS:
            expected = gguf.dequantize(content[kind], Types[kind])
            assert file[kind].dtype == torch.float32
            np.testing.assert_array_equal(file[kind].numpy(), expected)


def test_metadata_of_every_type(tmp_path):
    theirs = writer(tmp_path / "x.gguf")
    T = gguf.GGUFValueType
    numbers = {"uint8": 200, "int8": -3, "uint16": 60_000, "int16": -300, "uint32": 2**32 - 1, "int32": -2**31,
               "uint64": 2**64 - 1, "int64": -2**63, "float64": 0.1, "float32": 1e-5}
    for name, value in numbers.items():
        theirs.add_key_value(name, value, T[name.upper()])
    theirs.add_bool("yes", True)
    theirs.add_string("text", "a 猫\0\n")
    theirs.add_array("words", ["", "é", "ab"])
    theirs.add_array("numbers", [1, -2, 3])
    theirs.add_array("floats", [0.5, 2.0])
    theirs.add_array("flags", [True, False])
    finish(theirs)
    found = GGUFFile(tmp_path / "x.gguf").metadata
    assert {name: found[name] for name in numbers} == numbers
    assert found["yes"] is True and found["text"] == "a 猫\0\n" and found["words"] == ["", "é", "ab"]
    assert found["numbers"].tolist() == [1, -2, 3] and found["floats"].tolist() == [0.5, 2]
    assert found["flags"].tolist() == [True, False] and found["general.architecture"] == "llama"


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_other_alignments(alignment, tmp_path):
    theirs = writer(tmp_path / "x.gguf")
    theirs.add_custom_alignment(alignment)
    weights = {name: np.random.default_rng(0).normal(size=shape).astype(np.float32)
               for name, shape in (("a", (3,)), ("b", (5, 7)), ("c", (2, 3, 4, 5)))}
    for name, weight in weights.items():
        theirs.add_tensor(name, weight)
    finish(theirs)
    file = GGUFFile(tmp_path / "x.gguf")
    assert all(stored.start % alignment == 0 for stored in file.tensors.values())
    for name, weight in weights.items():
        np.testing.assert_array_equal(file[name].numpy(), weight)


def test_a_file_for_other_machines_is_refused(tmp_path):
    theirs = writer(tmp_path / "x.gguf", endianess=gguf.GGUFEndian.BIG)
    theirs.add_tensor("a", np.ones(4, np.float32))
    finish(theirs)
    with pytest.raises(ValueError, match="version must be 2 or 3, the lowest byte first"):
        GGUFFile(tmp_path / "x.gguf")


def test_a_kind_that_we_have_not_is_refused_by_its_name(tmp_path):
    theirs = writer(tmp_path / "x.gguf")
    theirs.add_tensor("a", np.zeros((2, 110), np.uint8), raw_dtype=Types.Q3_K)
    finish(theirs)
    with pytest.raises(ValueError, match="kind of a must be one of .* not 'Q3_K'"):
        GGUFFile(tmp_path / "x.gguf")
    content = (tmp_path / "x.gguf").read_bytes().replace(struct.pack("<IQ", 11, 0), struct.pack("<IQ", 99, 0))
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(ValueError, match="not 'kind 99'"):
        GGUFFile(tmp_path / "x.gguf")


# ---- files of ours

METADATA = {"general.architecture": "llama", "llama.block_count": 2, "x.rate": 1e-5, "x.flag": False, "x.low": -5,
            "x.words": ["a", "猫", ""], "x.types": [1, 3, 1], "x.none": []}


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_package_reads_what_we_write(kind, dtype, tmp_path):
    torch.manual_seed(0)
    tensors = {"norm": torch.randn(5), "matrix": torch.randn(6, 64), "odd": torch.randn(3, 7), "turned": torch.randn(32, 4).T}
    tensors = {name: weight.to(dtype) for name, weight in tensors.items()}
    write_gguf(tmp_path / "x.gguf", METADATA, tensors, kind)
    theirs, ours = gguf.GGUFReader(tmp_path / "x.gguf"), GGUFFile(tmp_path / "x.gguf")
    for name, value in METADATA.items():
        found = theirs.fields[name].contents()
        assert found == (np.float32(value) if isinstance(value, float) else value)
        mine = ours.metadata[name]
        assert (mine.tolist() if isinstance(mine, np.ndarray) else mine) == value
    kinds = {"norm": "F32", "odd": "F16" if kind == "Q8_0" else kind}
    for tensor in theirs.tensors:
        assert tensor.tensor_type.name == ours.tensors[tensor.name].kind == kinds.get(tensor.name, kind)
        numbers = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(ours[tensor.name].numpy(), numbers)
        expected = tensors[tensor.name].float()
        largest = {"F32": 0, "F16": 2**-9, "Q8_0": 0.02}[ours.tensors[tensor.name].kind]
        torch.testing.assert_close(torch.from_numpy(numbers.copy()), expected, atol=largest, rtol=0)


def test_other_kinds_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="kind must be 'F32', 'F16' or 'Q8_0', not 'Q4_1'"):
        write_gguf(tmp_path / "x.gguf", {}, {"a": torch.zeros(32, 32)}, "Q4_1")


# ---- liars

@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A whole file with a bit of everything, as short as may be."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_gguf(path, METADATA, {"norm": torch.randn(3), "m": torch.randn(2, 32)}, "Q8_0")
    return path.read_bytes()


@pytest.fixture
def changing(tmp_path):
    """A file that stays open, because opening one to write takes milliseconds."""
    with open(tmp_path / "x.gguf", "w+b", buffering=0) as file:
        yield file


def outcome(changing, content: bytes) -> str:
    """Read all there is: sound, or a ValueError; anything else fails the test."""
    changing.seek(0)
    changing.write(content)
    changing.truncate()
    path = changing.name
    try:
        file = GGUFFile(path)
        assert sum(file[name].numel() for name in file) <= 32 * len(content)
    except ValueError as error:
        assert str(path) in str(error)
        return "refused"
    return "sound"


def test_a_file_that_is_cut_off_anywhere_is_refused(tiny, changing):
    assert outcome(changing, tiny) == "sound"
    for n in range(len(tiny)):
        assert outcome(changing, tiny[:n]) == "refused", n


@pytest.mark.parametrize("n_trials", [400, pytest.param(4_000, marks=pytest.mark.slow)])
def test_damaged_files_are_sound_or_refused_and_take_no_memory(n_trials, tiny, changing):
    rng, found = np.random.default_rng(n_trials), set()
    tracemalloc.start()
    try:
        for trial in range(n_trials):
            content = bytearray(tiny)
            for at in rng.integers(0, len(tiny), rng.integers(1, 4)):
                content[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.integers(256)])
            found.add(outcome(changing, bytes(content)))
        assert tracemalloc.get_traced_memory()[1] < 2**21
    finally:
        tracemalloc.stop()
    assert found == {"sound", "refused"}


HUGE = [2**40, 2**64 - 1]


@pytest.mark.parametrize("huge", HUGE)
def test_huge_numbers_in_every_place(huge, tiny, changing):
    """Every eight bytes, wherever they begin, are one of the file's lengths, counts and offsets."""
    tracemalloc.start()
    try:
        for at in range(4, len(tiny) - 8):
            outcome(changing, tiny[:at] + struct.pack("<Q", huge) + tiny[at + 8:])
        assert tracemalloc.get_traced_memory()[1] < 2**21
    finally:
        tracemalloc.stop()


def by_hand(*parts, version=3, n_tensors=0, n_values=0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_values) + b"".join(parts)


def text(string: str) -> bytes:
    return struct.pack("<Q", len(string.encode())) + string.encode()


def entry(name, shape=(2, 4), kind=0, offset=0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, offset)


NESTED = struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 100_000
LIES = {
    "empty": (b"", "cannot mmap an empty file"),
    "a pickle": (b"\x80\x04K\x01." * 10, "the first four bytes must be GGUF"),
    "old": (by_hand(version=1), "version must be 2 or 3"),
    "two of a name": (by_hand(text("a"), struct.pack("<II", 4, 1), text("a"), struct.pack("<II", 4, 1), n_values=2), "a must be there once"),
    "nested arrays": (by_hand(text("a"), NESTED, n_values=1), "type of a value must be"),
    "type": (by_hand(text("a"), struct.pack("<I", 13), n_values=1), "type of a value must be"),
    "no UTF-8": (by_hand(struct.pack("<Q", 1), b"\xff", n_values=1), "codec can't decode"),
    "alignment": (by_hand(text("general.alignment"), struct.pack("<II", 4, 24), n_values=1), "general.alignment must be a power of two, not 24"),
    "no alignment": (by_hand(text("general.alignment"), struct.pack("<II", 4, 0), n_values=1), "general.alignment must be"),
    "text alignment": (by_hand(text("general.alignment"), struct.pack("<I", 8), text("32"), n_values=1), "general.alignment must be"),
    "one tensor twice": (by_hand(entry("a"), entry("a"), n_tensors=2), "a must be one tensor"),
    "no axes": (by_hand(entry("a", ()), n_tensors=1), "a must be one tensor of 1 to 4 axes, not 0"),
    "five axes": (by_hand(entry("a", (1,) * 5), n_tensors=1), "of 1 to 4 axes, not 5"),
    "a million axes": (by_hand(text("a"), struct.pack("<I", 10**6), n_tensors=1), "of 1 to 4 axes"),
    "nothing": (by_hand(entry("a", (2, 0)), n_tensors=1), "shape of a must be"),
    "half a block": (by_hand(entry("a", (2, 33), 8), n_tensors=1), "shape of a must be of whole blocks of 32"),
    "product overflows": (by_hand(entry("a", (2**32, 2**32)), bytes(100), n_tensors=1), "a must be in the file"),
    "overlap": (by_hand(entry("a"), entry("b"), bytes(200), n_tensors=2), "b must be in the file .* after byte"),
    "crooked": (by_hand(entry("a", offset=8), bytes(200), n_tensors=1), "a must be in the file .* aligned"),
}


@pytest.mark.parametrize("name", LIES)
def test_what_a_liar_is_told(name, tmp_path):
    content, message = LIES[name]
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        GGUFFile(tmp_path / "x.gguf")


def test_the_lists_of_lies_begin_from_the_truth(tmp_path):
    (tmp_path / "x.gguf").write_bytes(by_hand(entry("a"), entry("b", offset=32), bytes(200), n_tensors=2))
    assert GGUFFile(tmp_path / "x.gguf")["b"].shape == (2, 4)


def test_there_is_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        GGUFFile(tmp_path / "none.gguf")
