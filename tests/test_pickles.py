"""Files of other programs: what the published ones hold is read, and nothing in any of them is executed."""

from __future__ import annotations

import argparse
import contextlib
import gzip
import os
import pickle
import sys
import time
import types
import zipfile
import zlib
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA, IncrementalPCA

from reglue.errors import UserError
from reglue.pickles import MOST_BYTES, read_untrusted
from reglue.published.compressors import read_official_compressor, read_statistics
from reglue.published.containers import read_official

FEATURES = np.random.default_rng(0).standard_normal((200, 12)) @ np.random.default_rng(1).standard_normal((12, 12))
STATISTICS = {"mean": FEATURES.mean(0, dtype=np.float32), "std": FEATURES.std(0, dtype=np.float32) + 0.1}


def pickled(content: Any, file: Path, protocol: int = pickle.DEFAULT_PROTOCOL) -> None:
    file.write_bytes(pickle.dumps(content, protocol))


WRITERS = {
    "torch": torch.save,
    "torch, old format": lambda content, file: torch.save(content, file, _use_new_zipfile_serialization=False),
    **{f"pickle {p}": lambda content, file, p=p: pickled(content, file, p) for p in range(6)},
    "joblib": joblib.dump,
    "joblib, zlib": lambda content, file: joblib.dump(content, file, compress=3),
    "joblib, gzip": lambda content, file: joblib.dump(content, file, compress=("gzip", 3)),  # type: ignore[reportArgumentType]
    "gzip": lambda content, file: file.write_bytes(gzip.compress(pickle.dumps(content))),
}


@pytest.mark.parametrize("kind", [PCA, IncrementalPCA])
@pytest.mark.parametrize("writer", [name for name in WRITERS if name != "torch, old format"])
def test_redis_components_from_every_container(writer: str, kind: type, tmp_path: Path) -> None:
    standardised = (FEATURES - STATISTICS["mean"]) / STATISTICS["std"]
    fitted = kind(n_components=4).fit(standardised)
    file = tmp_path / "pca"
    WRITERS[writer]({"pca_model": fitted, **STATISTICS}, file)
    compressor = read_official_compressor(file, None, channels=4)
    expected = torch.from_numpy(fitted.transform(standardised)).float()
    features = torch.from_numpy(FEATURES).float()[:, :, None, None]
    torch.testing.assert_close(compressor.encode(features)[:, :, 0, 0], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(read_official_compressor(file, None, channels=3).components, compressor.components[:3])  # type: ignore[attr-defined]


@pytest.mark.parametrize("writer", [*WRITERS, "npz", "npy"])
def test_statistics_from_every_container(writer: str, tmp_path: Path) -> None:
    file = tmp_path / f"statistics.{writer}"
    if writer == "npz":
        np.savez(file, **STATISTICS)
    elif writer == "npy":
        np.save(file, STATISTICS, allow_pickle=True)  # type: ignore[arg-type]
    elif writer == "torch, old format":
        WRITERS[writer]({name: torch.from_numpy(value) for name, value in STATISTICS.items()}, file)
    else:
        WRITERS[writer](STATISTICS, file)
    mean, std = read_statistics(file)
    assert torch.equal(mean, torch.from_numpy(STATISTICS["mean"]))
    assert torch.equal(std, torch.from_numpy(STATISTICS["std"]))


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2", "<i8", "|u1", "?"])
@pytest.mark.parametrize("writer", ["torch", "pickle 2", "pickle 5", "joblib"])
def test_arrays_keep_their_numbers(writer: str, dtype: str, order: Any, tmp_path: Path) -> None:
    array = np.asarray(np.arange(24).reshape(2, 3, 4) % 2, dtype=dtype, order=order)
    WRITERS[writer]({"array": array, "also": [array, 1, "text", None]}, tmp_path / "file")
    read = read_untrusted(tmp_path / "file")
    for found in (read["array"], read["also"][0]):
        np.testing.assert_array_equal(found, array)
        assert found.dtype == array.dtype
    assert read["also"][1:] == [1, "text", None]


def test_options_that_a_checkpoint_was_trained_with(tmp_path: Path) -> None:
    arguments = argparse.Namespace(path_type="cosine", encoder_depth=8, output=Path("exps"), none=None)
    for writer in ("torch", "torch, old format", "pickle 4"):
        WRITERS[writer]({"args": arguments}, tmp_path / "file")
        read = read_untrusted(tmp_path / "file")["args"]
        assert (read["path_type"], read["encoder_depth"], read["none"]) == ("cosine", 8, None)


class Executes:
    """Runs a command when it is unpickled, as an attacker would have it."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def attacks(canary: Path) -> dict[str, Any]:
    command = Executes(os.system, f"touch {canary}")
    fitted = PCA(2).fit(FEATURES)
    fitted.random_state = command  # type: ignore[assignment]
    return {
        "bare": command,
        "nested in args": {"ema": {"w": torch.zeros(1)}, "args": argparse.Namespace(a=[1, {"b": command}])},
        "in the components": {"pca_model": fitted, **STATISTICS},
        "in the statistics": {"mean": command, "std": STATISTICS["std"]},
        "in an array": {"mean": np.array([command, 1], dtype=object), "std": STATISTICS["std"]},
        "eval": {"mean": Executes(eval, f"open({str(canary)!r}, 'w')")},
        "getattr": Executes(getattr, Executes(__import__, "os"), "system"),
        "open": Executes(open, str(canary), "w"),
        "through numpy": Executes(np.load, str(canary)),
    }


@pytest.mark.parametrize("writer", ["torch", "torch, old format", "pickle 0", "pickle 2", "pickle 4", "joblib", "npy"])
@pytest.mark.parametrize("attack", attacks(Path("canary")))
def test_nothing_is_executed(attack: str, writer: str, tmp_path: Path) -> None:
    canary, file = tmp_path / "canary", tmp_path / "innocent.npy"
    content = attacks(canary)[attack]
    if writer == "npy":
        np.save(file, np.array(content, dtype=object), allow_pickle=True)
    else:
        WRITERS[writer](content, file)
    for read in (read_statistics, lambda path: read_official_compressor(path, None, 2), read_official):
        with pytest.raises(UserError, match="innocent") as caught:
            read(file)
        assert "\n" not in str(caught.value)
    assert not canary.exists()


@pytest.mark.parametrize("writer", ["torch", "torch, old format", "pickle 2", "pickle 4", "joblib"])
def test_what_a_refused_file_asks_for_is_named(writer: str, tmp_path: Path) -> None:
    file = tmp_path / "file.pt"
    WRITERS[writer]({"weights": Executes(os.system, "true")}, file)
    with pytest.raises(UserError) as caught:
        read_untrusted(file)
    asked = "it asks for posix.system, which no published file needs"
    assert str(caught.value) == f"{file}: holds more than data and was not opened: {asked}"


DAMAGED = "damaged, cut short, or no checkpoint; fetch it again"


@pytest.mark.parametrize("kept", [0, 10, 100, 0.5, 0.99])
@pytest.mark.parametrize("writer", ["torch", "torch, old format", "pickle 2", "pickle 4", "joblib, zlib", "gzip"])
def test_a_file_that_is_cut_short_is_no_suspect(writer: str, kept: float, tmp_path: Path) -> None:
    file = tmp_path / "file.pt"
    WRITERS[writer]({"weights": {"a": [torch.zeros(50, 10)] if "torch" in writer else list(range(200))}}, file)
    whole = file.read_bytes()
    file.write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    with pytest.raises(UserError, match=rf"^{file}: {DAMAGED} \([A-Za-z]+\)$"):
        read_untrusted(file)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n",
            "is a Git LFS pointer.*git lfs pull",
        ),
        ("<!DOCTYPE html>\n<html><body>Not found</body></html>", "is a web page and no checkpoint"),
        ("\n <html>Log in</html>", "is a web page and no checkpoint"),
        ('{"error": "not found"}', DAMAGED),
    ],
)
def test_what_was_saved_in_place_of_a_checkpoint_is_named(content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "file.pt").write_text(content)
    with pytest.raises(UserError, match=rf"^{tmp_path}/file\.pt: {says}"):
        read_untrusted(tmp_path / "file.pt")


def test_the_attacks_would_work(tmp_path: Path) -> None:
    """On who reads the same files as Python does by default."""
    pickled(attacks(tmp_path / "canary")["bare"], tmp_path / "file")
    joblib.load(tmp_path / "file")
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", [b"argparse\nNamespace", b"sklearn.decomposition\nPCA", b"numpy\ndtype"])
def test_the_stand_ins_themselves_cannot_be_changed(name: bytes, tmp_path: Path) -> None:
    # GLOBAL name, then BUILD with the state (None, {"arguments": 1}): setattr on the class itself.
    (tmp_path / "file.pkl").write_bytes(b"\x80\x02c" + name + b"\nN}X\x09\x00\x00\x00argumentsK\x01s\x86b.")
    with pytest.raises(UserError, match=r"file\.pkl"):
        read_untrusted(tmp_path / "file.pkl")


def test_a_forged_type_cannot_make_an_array_of_objects(tmp_path: Path) -> None:
    forged = np.array([1.0, 2.0])
    for code in ("O8", "V8", "M8[ns]", "f8,O"):
        content = pickle.dumps({"mean": forged, "std": forged}, 2).replace(b"X\x02\x00\x00\x00f8", _text(code))
        assert content != pickle.dumps({"mean": forged, "std": forged}, 2)
        (tmp_path / "file.pkl").write_bytes(content)
        with pytest.raises(UserError, match="where numbers were expected"):
            read_statistics(tmp_path / "file.pkl")


def _text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


@settings(max_examples=200)
@given(st.one_of(st.binary(max_size=200), st.data()))
def test_damaged_files_are_refused_by_name(tmp_path_factory: pytest.TempPathFactory, content: Any) -> None:
    file = tmp_path_factory.mktemp("damaged") / "damaged.pkl"
    if isinstance(content, bytes):
        damaged = content
    else:
        whole = pickle.dumps({"pca_model": PCA(2).fit(FEATURES), **STATISTICS})
        position = content.draw(st.integers(0, len(whole) - 1))
        damaged = whole[:position] + content.draw(st.binary(max_size=8)) + whole[position + 1 :]
    file.write_bytes(damaged)
    # Some damage does no harm; whatever else comes of it is one line that names the file.
    with contextlib.suppress(UserError):
        read_official_compressor(file, None, 2)
    try:
        read_untrusted(file)
    except UserError as error:
        message = str(error)
    else:
        message = "damaged.pkl"
    assert "damaged.pkl" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"mean": STATISTICS["mean"]}, r"expected \{mean, std\}, found \{mean\}"),
        ({"mean": STATISTICS["mean"], "std": STATISTICS["std"][:3]}, "found 12 and 3"),
        ({"mean": STATISTICS["mean"], "std": 0 * STATISTICS["std"]}, "std positive"),
        ({"mean": "zero", "std": STATISTICS["std"]}, "mean is str"),
        ([1, 2], "found list"),
    ],
)
def test_other_statistics_are_refused(content: Any, message: str, tmp_path: Path) -> None:
    pickled(content, tmp_path / "statistics.pkl")
    with pytest.raises(UserError, match=message):
        read_statistics(tmp_path / "statistics.pkl")


def with_whiten(value: Any) -> PCA:
    """Components that say so of themselves."""
    return PCA(4).fit(FEATURES).set_params(whiten=value)


def test_other_components_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "pca.pkl"
    for model, message in (
        (PCA(4, whiten=True).fit(FEATURES), "whitened"),
        *((with_whiten(value), "whitened") for value in (1, np.ones(2), "no", [1], 0.5)),
        (PCA(4).fit(FEATURES[:, :7]), "not of the same features"),
        (PCA(4), "no components_ and mean_"),
    ):
        pickled({"pca_model": model, **STATISTICS}, file)
        with pytest.raises(UserError, match=message):
            read_official_compressor(file, None, 4)
    pickled({"pca_model": PCA(4).fit(FEATURES), **STATISTICS}, file)
    with pytest.raises(UserError, match="makes 4 channels, but the model has 8"):
        read_official_compressor(file, None, 8)
    with pytest.raises(UserError, match=r"^statistics .*: leave it out, since .* has its own$"):
        read_official_compressor(file, file, 4)


def test_zlib_without_joblib_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(zlib.compress(pickle.dumps(STATISTICS)))
    assert torch.equal(read_statistics(tmp_path / "file")[0], torch.from_numpy(STATISTICS["mean"]))


# ---- small files that stand for more than any memory holds, or keep their reader busy


def doubled(kind: Any, times: int = 60) -> Any:
    """kind([x, x]) of itself, so often: 2^60 objects in a few hundred bytes."""
    value = kind([1])
    for _ in range(times):
        value = kind([value, value])
    return value


def cyclic() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


def short(number: int) -> bytes:
    return b"\x8a\x0a" + number.to_bytes(10, "little")


# LONG1, of the multiples of Python's hash modulus: all of them are looked for in the same place of a dict.
CLASHING = b"".join(short(i * (2**61 - 1)) + b"N" for i in range(1, 30_000))
TUPLE = b"K\x01\x85" + b"2\x86" * 60
"""DUP and TUPLE2, sixty times; its hash takes 2^60 steps."""


def repeated() -> dict[str, bytes]:
    """Programs that hand one long list on, 30,000 times, by every operation that calls or fills something."""
    ordered, plain = b"ccollections\nOrderedDict\n", b"cargparse\nNamespace\n"
    # Number 0 is the class, 1 a pair, 2 the long list or tuple of pairs, 3 the arguments (2,), 4 a dict of as many.
    pairs = b"K\x01K\x02\x86q\x010](" + b"h\x01" * 30_000 + b"eq\x02\x85q\x030"
    long_tuple = b"(" + b"K\x01" * 30_000 + b"tq\x030"
    long_dict = b"}(" + b"".join(b"J" + i.to_bytes(4, "little") + b"N" for i in range(30_000)) + b"uq\x04\x85q\x030"

    def program(kind: bytes, given: bytes, call: bytes) -> bytes:
        return b"\x80\x04" + kind + b"q\x000" + given + call * 30_000 + b"N."

    return {
        "REDUCE": program(ordered, pairs, b"h\x00h\x03R0"),
        "REDUCE of a dict": program(ordered, long_dict, b"h\x00h\x03R0"),
        "REDUCE of a tuple": program(plain, long_tuple, b"h\x00h\x03R0"),
        "NEWOBJ": program(ordered, pairs, b"h\x00h\x03\x810"),
        "NEWOBJ, kept": program(plain, long_tuple, b"h\x00h\x03\x81"),
        "NEWOBJ_EX": program(plain, long_tuple, b"h\x00h\x03}\x920"),
        "OBJ": program(ordered, pairs, b"(h\x00h\x02o0"),
        "INST": program(ordered, pairs, b"(h\x02icollections\nOrderedDict\n0"),
        "BUILD": program(ordered, long_dict, b"h\x00)Rh\x04b0"),
    }


BOMBS = {
    "lists": pickle.dumps(doubled(list), 2),
    "tuples": pickle.dumps(doubled(tuple), 2),
    "dicts": pickle.dumps(doubled(lambda pair: dict(zip("ab", pair, strict=False))), 2),
    "a cycle": pickle.dumps(cyclic(), 2),
    "depth": b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".",
    "a tuple as a key": b"\x80\x02}" + TUPLE + b"Ns.",
    "tuples as keys": b"\x80\x02}(" + TUPLE + b"Nu.",
    "a dict of tuples": b"\x80\x02(" + TUPLE + b"Nd.",
    "a set of tuples": b"\x80\x04\x8f(" + TUPLE + b"\x90.",
    "a frozen set of tuples": b"\x80\x04(" + TUPLE + b"\x91.",
    "a count of tuples": b"\x80\x02ccollections\nCounter\n]K\x01" + TUPLE + b"\x86a\x85R.",
    "a called set": b"\x80\x02c__builtin__\nset\n]" + TUPLE + b"a\x85R.",
    "pairs": b"\x80\x02ccollections\nOrderedDict\n](]" + TUPLE + b"aNae\x85R.",
    "clashing keys": b"\x80\x02}(" + CLASHING + b"u.",
    "clashing numbers of objects": b"N" + b"".join(b"p%d\n" % (i * (2**61 - 1)) for i in range(1, 30_000)) + b".",
    "operations": b"\x80\x02" + b"N0" * 1_000_000 + b"N.",
    "one text, encoded again and again": (
        b"\x80\x02c_codecs\nencode\nq\x01X" + (10**6).to_bytes(4, "little") + b"a" * 10**6 + b"q\x02"
        b"X\x06\x00\x00\x00latin1q\x0300" + b"h\x01h\x02h\x03\x86R" * 500 + b"."
    ),
    **{f"one list given again and again: {how}": content for how, content in repeated().items()},
    "a set of one text, again and again": (
        b"\x80\x02c__builtin__\nset\nq\x00X" + (10**6).to_bytes(4, "little") + b"a" * 10**6 + b"\x85q\x01"
        + b"0h\x00h\x01R" * 9_000 + b"."
    ),
    "long keys": (
        b"\x80\x02" + 2 * (b"X" + (10**7).to_bytes(4, "little") + b"a" * 10**7 + b"q\x01") + b"q\x020}h\x01Ns" +
        b"h\x02Ns" * 20_000 + b"."
    ),
    "bytes of a size": b"\x80\x05\x8e" + (10**14).to_bytes(8, "little") + b".",
    "a bytearray of a size": b"\x80\x05\x96" + (10**11).to_bytes(8, "little") + b".",
    "a text of a size": b"\x80\x05\x8d" + (10**14).to_bytes(8, "little") + b".",
}  # fmt: skip


def zipped(content: bytes, file: Path) -> None:
    """As PyTorch's archives are."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in {"a/data.pkl": content, "a/byteorder": b"little", "a/version": b"3\n"}.items():
            archive.writestr(name, text)


def old(content: bytes, file: Path) -> None:
    """As PyTorch's files before version 1.6."""
    torch.save({}, file, _use_new_zipfile_serialization=False)
    empty = file.read_bytes()
    [at] = [i for i in range(len(empty)) if empty[i:].startswith(b"\x80\x02}q\x00.")]
    file.write_bytes(empty[:at] + content + empty[at + 6 :])


BOMB_WRITERS: dict[str, Any] = {
    "plain": lambda content, file: file.write_bytes(content),
    "torch": zipped,
    "torch, old format": old,
    "gzip": lambda content, file: file.write_bytes(gzip.compress(content)),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_refused_at_once(bomb: str, tmp_path: Path) -> None:
    for writer in BOMB_WRITERS if len(BOMBS[bomb]) < 10_000 else ("torch",):
        file = tmp_path / writer
        BOMB_WRITERS[writer](BOMBS[bomb], file)
        start = time.process_time()
        with pytest.raises(UserError, match=rf"^{file}: ") as caught:
            read_untrusted(file)
        assert time.process_time() - start < 5, writer
        assert "\n" not in str(caught.value)


def test_what_a_file_unpacks_to_is_bounded(tmp_path: Path) -> None:
    zeros = bytes(MOST_BYTES + 1)
    (tmp_path / "gzip").write_bytes(gzip.compress(zeros, 1))
    with pytest.raises(UserError, match="gzip: no checkpoint, but a small file that stands for more than"):
        read_untrusted(tmp_path / "gzip")
    with zipfile.ZipFile(tmp_path / "numbers.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("mean.npy", zeros)
    with pytest.raises(UserError, match=r"numbers\.npz: no checkpoint, but a small file that stands for more than"):
        read_statistics(tmp_path / "numbers.npz")


@pytest.mark.parametrize("name", ["Tensor", "FloatStorage", "storage.UntypedStorage"])
def test_new_tensors_are_not_made(name: str, tmp_path: Path) -> None:
    module, _, kind = f"torch.{name}".rpartition(".")
    content = b"\x80\x02c" + f"{module}\n{kind}\n".encode() + short(10**12) + b"\x85R."
    zipped(content, tmp_path / "file.pt")
    with pytest.raises(UserError, match="stands for new tensors, which are not in it"):
        read_untrusted(tmp_path / "file.pt")


def test_tensors_and_arrays_larger_than_the_file_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "file.pt"
    torch.save({"w": torch.zeros(1).expand(10**9, 10**9)}, file)
    with pytest.raises(UserError, match="a small file that stands for a tensor of 1,000,000,000,000,000,000 numbers"):
        read_untrusted(file)
    for shape in ((10**14,), ("a", 10**14), (-1,), (2**62,) * 40, 3):
        content = pickle.dumps({"mean": np.zeros(2), "std": np.zeros(2)}, 2)
        forged = content.replace(b"K\x02\x85", pickle.dumps(shape, 2)[2:-1])
        assert forged != content
        file.write_bytes(forged)
        with pytest.raises(UserError, match=r"file\.pt"):
            read_statistics(file)


@settings(max_examples=150)
@given(
    operations=st.lists(
        st.one_of(
            st.sampled_from([bytes([code]) for code in pickle._Unpickler.dispatch if code]),
            st.sampled_from([b"cargparse\nNamespace\n", b"ccollections\nOrderedDict\n", b"c_codecs\nencode\n", b"K\x01",
                             b"cnumpy\ndtype\n", b"X\x01\x00\x00\x00a", TUPLE, b"(", b"}", b"]", b"\x85", b"2\x86" * 40,
                             b"cjoblib.numpy_pickle\nNumpyArrayWrapper\n", b"ctorch._utils\n_rebuild_tensor_v2\n"]),
            st.binary(max_size=9),
        ),
        max_size=25,
    ),
    writer=st.sampled_from([*BOMB_WRITERS]),
)  # fmt: skip
def test_any_pickle_ends_soon(operations: list[bytes], writer: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("any") / "any.pkl"
    BOMB_WRITERS[writer](b"\x80\x02" + b"".join(operations) + b".", file)
    start = time.process_time()
    with contextlib.suppress(UserError):
        read_untrusted(file)
    assert time.process_time() - start < 3


class ModelCheckpoint:
    """Stands for Lightning's, whose old checkpoints have the class itself as a key."""

    __module__ = "pytorch_lightning.callbacks.model_checkpoint"


@pytest.mark.parametrize("writer", ["torch", "torch, old format"])
def test_lightnings_checkpoints(writer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType(ModelCheckpoint.__module__)
    module.ModelCheckpoint = ModelCheckpoint  # type: ignore[attr-defined]
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", ModelCheckpoint.__module__):
        monkeypatch.setitem(sys.modules, name, module)
    content = {
        "callbacks": {ModelCheckpoint: {"best_model_score": torch.tensor(1.0), "monitor": "loss", "dirpath": tmp_path}},
        "lr_schedulers": [{"milestones": Counter([3, 5]), "kinds": {1, 2}}],
        "hyper_parameters": OrderedDict(width=48, betas=(0.9, 0.95), kinds=defaultdict(list, a=[1])),
        "state_dict": OrderedDict(weight=torch.nn.Parameter(torch.ones(2))),
    }
    WRITERS[writer](content, tmp_path / "file.ckpt")
    read = read_untrusted(tmp_path / "file.ckpt")
    assert read["hyper_parameters"] == {"width": 48, "betas": (0.9, 0.95), "kinds": {"a": [1]}}
    assert torch.equal(read["state_dict"]["weight"], torch.ones(2))
    assert not read["state_dict"]["weight"].requires_grad
