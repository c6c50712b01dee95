"""Files that are not read where they lie: compressed ones are unpacked, remote ones fetched, each once a machine."""

from __future__ import annotations

import gzip
import io
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pyarrow as pa
import pytest
import tiny
from fsspec.implementations.memory import MemoryFileSystem

from sftstream import SourceConfig
from sftstream.formats import decode_row
from sftstream.records import Ref
from sftstream.sources import Corpus, StreamedReader, StreamedSource, remote
from sftstream.sources.corpus import FileSet
from sftstream.sources.file_formats import compressed

ROWS = [{"n": number, "text": "ä" * number} for number in range(50)]
PLAIN = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFTSTREAM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.rm("/", recursive=True)


class Bucket(MemoryFileSystem):  # type: ignore[misc]
    """An object store as s3fs shows one: objects have tags, and no other trace of a change."""

    protocol = "bucket"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    opened: ClassVar[list[str]] = []
    tag = '"1"'

    @classmethod
    def _strip_protocol(cls, path: str) -> Any:
        return super()._strip_protocol(path.removeprefix("bucket://"))

    def info(self, path: str, **arguments: Any) -> dict[str, Any]:
        info = super().info(path, **arguments)
        return {key: info[key] for key in ("name", "size", "type")} | {"ETag": self.tag}

    def _open(self, path: str, mode: str = "rb", **arguments: Any) -> Any:
        if mode == "rb":
            self.opened.append(path)
        return super()._open(path, mode, **arguments)


@pytest.fixture
def bucket() -> Iterator[Bucket]:
    fsspec.register_implementation("bucket", Bucket, clobber=True)
    filesystem = fsspec.filesystem("bucket")
    yield filesystem
    filesystem.store.clear()
    filesystem.opened.clear()


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": lambda content: pa.compress(content, "zstd", asbytes=True),
}


def opened(path: Path | str) -> FileSet:
    return FileSet(SourceConfig(path=str(path)))


def read_all(source: FileSet) -> list[Any]:
    return [decode_row(source.read(row)) for row in range(len(source))]


def refusal(path: Path | str, **fields: Any) -> str:
    with pytest.raises(ValueError, match=r".") as error:
        FileSet(SourceConfig(path=str(path), **fields))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_a_compressed_file_reads_like_the_plain_one(tmp_path: Path, suffix: str, kind: str) -> None:
    content = {"jsonl": PLAIN, "json": json.dumps(ROWS).encode(), "csv": b"n,text\n1,x\n2,y\n"}[kind]
    plain = tmp_path / f"a.{kind}"
    plain.write_bytes(content)
    packed = tmp_path / f"b.{kind}{suffix}"
    packed.write_bytes(PACKERS[suffix](content))
    source = opened(packed)
    assert read_all(source) == read_all(opened(plain))
    assert source.locate_row(1).startswith(f"{packed}:2" if kind == "jsonl" else f"{packed}")
    (file,) = source.files
    assert (file.identity.name, file.identity.size) == (packed.name, packed.stat().st_size)


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_compressed_table_is_unpacked_and_read(tmp_path: Path, suffix: str) -> None:
    tiny.write_parquet(tmp_path / "a.parquet", ROWS)
    packed = tmp_path / f"a.parquet{suffix}"
    packed.write_bytes(PACKERS[suffix]((tmp_path / "a.parquet").read_bytes()))
    assert read_all(opened(packed)) == ROWS


def test_members_of_a_compressed_file_are_one_after_the_other(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"1\n2\n") + gzip.compress(b"3\n"))
    assert read_all(opened(tmp_path / "a.jsonl.gz")) == [1, 2, 3]


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_a_compressed_file_of_nothing_is_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(PACKERS[suffix](content))
    assert refusal(path) == f"source '{path}' holds no row; remove the source or name a file with conversations"


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("length", [3, 12, -9, -1])
def test_a_compressed_file_that_was_cut_is_refused_and_leaves_nothing(tmp_path: Path, suffix: str, length: int) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(PACKERS[suffix](PLAIN)[:length])
    assert refusal(path) == f"{path} cannot be unpacked: Truncated compressed stream; restore the file"
    assert [file.name for file in (tmp_path / "cache").rglob("*") if file.is_file()] == ["lock"]


def test_a_file_that_is_not_compressed_as_its_name_says_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(PLAIN)
    assert read_all(opened(tmp_path / "a.jsonl.gz")) == ROWS


def _read(path: Path) -> int:
    return len(read_all(opened(path)))


def test_processes_that_start_at_once_unpack_a_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unpack = compressed._blocks

    def slow(*arguments: Any) -> Iterator[bytes]:
        with (tmp_path / "unpackers").open("a") as unpackers:
            unpackers.write("one\n")
        time.sleep(0.3)
        return unpack(*arguments)

    monkeypatch.setattr(compressed, "_blocks", slow)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(PLAIN))
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(_read, [path] * 8, chunksize=1) == [50] * 8
    assert (tmp_path / "unpackers").read_text() == "one\n"


def test_a_copy_that_was_damaged_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(PLAIN))
    opened(path)
    (copy,) = (tmp_path / "cache").rglob("*.unpacked")
    os.truncate(copy, 100)
    assert read_all(opened(path)) == ROWS


def test_another_content_is_unpacked_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    for content in (b"1\n", b"2\n"):
        path.write_bytes(gzip.compress(content, mtime=0))
        os.utime(path, (1, 1))
        assert read_all(opened(path)) == [int(content)]


def test_a_remote_file_is_fetched_once_and_keeps_its_name(bucket: Bucket) -> None:
    bucket.pipe("/data/a.jsonl", PLAIN)
    for _ in range(2):
        source = opened("bucket://data/a.jsonl")
        assert read_all(source) == ROWS
    assert bucket.opened == ["/data/a.jsonl"]
    assert source.locate_row(3) == "bucket:///data/a.jsonl:4"
    (file,) = source.files
    assert (file.identity.name, file.identity.size) == ("a.jsonl", len(PLAIN))


def test_a_remote_file_is_fetched_again_when_its_tag_or_size_changed(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.pipe("/a.jsonl", b"1\n")
    assert read_all(opened("bucket://a.jsonl")) == [1]
    bucket.pipe("/a.jsonl", b"2\n")
    assert read_all(opened("bucket://a.jsonl")) == [1]
    monkeypatch.setattr(Bucket, "tag", '"2"')
    assert read_all(opened("bucket://a.jsonl")) == [2]
    bucket.pipe("/a.jsonl", b"34\n")
    assert read_all(opened("bucket://a.jsonl")) == [34]


def test_the_identity_of_a_remote_file_is_that_of_its_content(
    tmp_path: Path, bucket: Bucket, memory: MemoryFileSystem
) -> None:
    (tmp_path / "a.jsonl").write_bytes(PLAIN)
    bucket.pipe("/there/a.jsonl", PLAIN)
    memory.pipe("/a.jsonl", PLAIN)
    paths = (tmp_path / "a.jsonl", "bucket://there/a.jsonl", "memory://a.jsonl")
    first, second, third = (opened(path).files[0].identity for path in paths)
    assert first == second == third


def test_a_filesystem_that_gives_times_tells_a_change_by_them(memory: MemoryFileSystem) -> None:
    memory.pipe("/a.jsonl", b"1\n")
    assert read_all(opened("memory://a.jsonl")) == [1]
    memory.pipe("/a.jsonl", b"2\n")
    assert read_all(opened("memory://a.jsonl")) == [2]


def test_remote_globs_and_directories_are_read_in_sorted_order(memory: MemoryFileSystem) -> None:
    memory.pipe({f"/d/{name}": content for name, content in (("b.jsonl", b"2\n"), ("a.json", b"[0, 1]"))})
    memory.pipe(
        {"/d/.c.jsonl": b"9\n", "/d/e/f.jsonl": b"4\n", "/d/README.md": b"", "/d/d.jsonl.gz": gzip.compress(b"3\n")}
    )
    assert read_all(opened("memory://d")) == [0, 1, 2, 3]
    assert read_all(opened("memory://d/*.jsonl")) == [2]
    assert read_all(opened("memory://d/**/*.jsonl")) == [2, 4]


def test_a_remote_parquet_file_and_a_remote_saved_dataset_are_read(memory: MemoryFileSystem, tmp_path: Path) -> None:
    import datasets

    rows = tiny.rows(6)
    tiny.write_parquet(tmp_path / "a.parquet", rows)
    memory.put(str(tmp_path / "a.parquet"), "/a.parquet")
    assert read_all(opened("memory://a.parquet")) == rows
    datasets.DatasetDict(train=datasets.Dataset.from_list(rows)).save_to_disk(
        str(tmp_path / "saved"), num_shards={"train": 2}
    )
    memory.put(str(tmp_path / "saved"), "/saved", recursive=True)
    source = FileSet(SourceConfig(path="memory://saved", split="train"))
    assert read_all(source) == rows
    assert source.locate_row(5) == "memory:///saved/train/data-00001-of-00002.arrow[2]"


def test_a_file_url_is_read_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(PLAIN)
    source = opened(f"file://{tmp_path}/a.jsonl")
    assert read_all(source) == ROWS
    assert source.locate_row(0) == f"{tmp_path}/a.jsonl:1"
    assert read_all(opened(f"file://{tmp_path}/*.jsonl")) == ROWS
    assert not list((tmp_path / "cache").rglob("*.fetched"))


def test_a_remote_path_that_matches_nothing_is_refused(memory: MemoryFileSystem) -> None:
    assert refusal("memory://none/*.jsonl") == (
        "source 'memory://none/*.jsonl' matches no file (looked for memory:///none/*.jsonl); correct the path"
    )


@pytest.mark.parametrize(("fields", "what"), [({"split": "a"}, "split = 'a'"), ({"subset": "b"}, "subset = 'b'")])
def test_a_split_of_a_remote_directory_of_files_is_refused(
    memory: MemoryFileSystem, fields: dict[str, str], what: str
) -> None:
    memory.pipe("/d/a.jsonl", b"1\n")
    assert refusal("memory://d", **fields) == (
        f"source 'memory://d' is a remote directory, for which {what} has no meaning; leave {next(iter(fields))} out"
    )


def test_a_scheme_whose_package_is_missing_is_one_line_that_names_it() -> None:
    fsspec.register_implementation(
        "nowhere", "no_such_package.FileSystem", clobber=True, errtxt="Install no_such_package"
    )
    assert refusal("nowhere://a.jsonl") == "source 'nowhere://a.jsonl' cannot be opened: Install no_such_package"


@pytest.mark.parametrize(
    ("url", "lack"),
    [
        *((url, "host, bucket or path") for url in ("s3://", "s3:///", "s3:///rows.jsonl", "gs://", "hf:///a/b.jsonl")),
        *(
            (url, "host, bucket or path")
            for url in ("https://", "https:///rows.jsonl", "memory://", "nope://", "file://")
        ),
        *((url, "host, bucket or path") for url in ("zip://a.jsonl::s3://", "simplecache::https:///a.jsonl")),
        *((url, "scheme") for url in ("://", "://bucket/rows.jsonl")),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_url_without_a_place_is_refused_before_anything_is_opened(
    monkeypatch: pytest.MonkeyPatch, url: str, lack: str, streaming: bool
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(fsspec, "url_to_fs", opened.append)
    source = SourceConfig(path=url, streaming=streaming, shuffle=False)
    with pytest.raises(ValueError, match=r".") as error:
        Corpus((source,))
    assert str(error.value) == (f"source {url!r} names no {lack}; write the whole URL, such as s3://bucket/rows.jsonl")
    assert opened == []


def test_an_unknown_scheme_is_refused() -> None:
    assert refusal("nope://a.jsonl") == "source 'nope://a.jsonl' cannot be opened: Protocol not known: nope"


def test_a_remote_file_that_arrives_in_part_is_refused_and_not_kept(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.pipe("/a.jsonl", PLAIN)
    monkeypatch.setattr(Bucket, "_open", lambda *_, **__: io.BytesIO(PLAIN[:100]))
    assert refusal("bucket://a.jsonl") == (
        f"bucket:///a.jsonl arrived with 100 of {len(PLAIN):,} bytes; start again to fetch the file again"
    )
    assert not list((tmp_path / "cache").rglob("*.fetched"))


def test_a_server_that_fails_is_refused_by_its_words(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("Access Denied")

    bucket.pipe("/a.jsonl", PLAIN)
    monkeypatch.setattr(Bucket, "_open", refuse)
    assert (
        refusal("bucket://a.jsonl")
        == "bucket:///a.jsonl cannot be fetched: Access Denied; check the address and the network, and start again"
    )
    monkeypatch.setattr(Bucket, "isfile", refuse)
    assert refusal("bucket://a.jsonl") == "source 'bucket://a.jsonl' cannot be read: Access Denied"


def test_a_large_file_of_a_web_server_that_gives_no_parts_is_fetched(tmp_path: Path, web: str) -> None:
    rows = [{"n": number, "text": "x" * 1_000_000} for number in range(20)]
    tiny.write_jsonl(tmp_path / "a.jsonl", rows)
    assert read_all(opened(f"{web}/a.jsonl")) == rows


def test_a_connection_that_breaks_is_one_line_that_names_the_file(
    tmp_path: Path, web: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_bytes(PLAIN)
    monkeypatch.setattr(tiny.WebFiles, "copyfile", lambda _, source, out: out.write(source.read(100)))
    assert refusal(f"{web}/a.jsonl").startswith(f"{web}/a.jsonl cannot be fetched: Response payload is not completed")
    with pytest.raises(ValueError, match=f"{web}/a.jsonl cannot be read: Response payload is not completed"):
        StreamedReader(StreamedSource(SourceConfig(path=f"{web}/a.jsonl", streaming=True))).read(Ref(0, 3, 0))


def test_a_url_with_a_query_is_of_the_kind_that_its_path_says() -> None:
    location = remote.RemoteLocation(fsspec.filesystem("memory"), "/x/a.jsonl.gz?download=true")
    assert location.name == "a.jsonl.gz"
