"""What is fetched is what is pinned."""

import hashlib
import io
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from support.packages import NO_NETWORK, make_source

from pipeline.errors import PipelineError
from pipeline.setup import places
from pipeline.setup.build import unpacked
from pipeline.setup.fetch import fetch_package, unpack
from pipeline.setup.pins import PackagePin

ROOT = Path(__file__).parents[2]


def test_fetching_checks_the_hash_and_happens_once(
    wheels: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin, target = make_source(wheels), tmp_path / "got" / "tiny.tar.gz"
    assert hashlib.sha256(fetch_package(pin, target, source=True).read_bytes()).hexdigest() == pin.sha256
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    fetch_package(pin, target, source=True)
    assert [path.name for path in target.parent.iterdir()] == ["tiny.tar.gz"]


def test_fetching_something_else_than_the_pin_is_refused(wheels: Path, tmp_path: Path) -> None:
    pin, target = replace(make_source(wheels), sha256="0" * 64), tmp_path / "got" / "tiny.tar.gz"
    with pytest.raises(PipelineError, match="another hash than sha256:0000"):
        fetch_package(pin, target, source=True)
    assert list(target.parent.iterdir()) == []


def test_archive_that_changed_on_disk_is_refused(wheels: Path, cache: Path) -> None:
    pin = make_source(wheels)
    archive = fetch_package(pin, cache / "downloads" / "tiny_tools-1.0.tar.gz", source=True)
    content = bytearray(archive.read_bytes())
    content[len(content) // 2] ^= 1
    archive.write_bytes(content)
    with pytest.raises(PipelineError, match=r"wrong hash for tiny-tools 1\.0: .* delete the file"):
        unpacked(pin)
    assert places.source_home(pin).exists() is False


def test_fetching_without_a_network_says_so(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in NO_NETWORK.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PipelineError, match=r"cannot be reached"):
        fetch_package(PackagePin("click", "8.1.0", "0" * 64), tmp_path / "got" / "x.whl", source=False)


def test_archive_that_names_a_place_outside_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "bad.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("top/../../escaped"), io.BytesIO(b""))
    with pytest.raises(PipelineError, match="outside of itself"):
        unpack(tmp_path / "bad.tar.gz", tmp_path / "a" / "b", lambda path: path)
    assert not (tmp_path / "escaped").exists()


def test_damaged_archive_is_one_message(tmp_path: Path) -> None:
    make_source(tmp_path)
    whole = (tmp_path / "tiny_tools-1.0.tar.gz").read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PipelineError, match=r"cut\.tar\.gz: damaged"):
        unpack(tmp_path / "cut.tar.gz", tmp_path / "tree", lambda path: path)
