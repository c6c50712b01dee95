"""Hugging Face datasets: what `save_to_disk` wrote, and what `load_dataset` reads from the hub or a directory like it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny

from sftstream import SourceConfig
from sftstream.formats import decode_row
from sftstream.sources import hub
from sftstream.sources.corpus import FileSet
from sftstream.sources.hub import is_repository
from sftstream.sources.streamed import StreamedSource

TRAIN, TEST = tiny.rows(10), tiny.rows(4, seed=1)
CARD = """---
license: mit
configs:
- config_name: whole
  data_files:
  - split: train
    path: data/train-*
  - split: test
    path: data/test-*
- config_name: small
  data_files:
  - split: train
    path: data/test-*
---
Dialogues of a few words.
"""


def opened(path: Path | str, **fields: Any) -> FileSet:
    return FileSet(SourceConfig(path=str(path), **fields))


def read_all(source: FileSet) -> list[Any]:
    return [decode_row(source.read(row)) for row in range(len(source))]


def refusal(path: Path | str, **fields: Any) -> str:
    with pytest.raises(ValueError, match=r".") as error:
        opened(path, **fields)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """One dataset in three files."""
    datasets.Dataset.from_list(TRAIN).save_to_disk(str(tmp_path / "saved"), num_shards=3)
    return tmp_path / "saved"


@pytest.fixture
def splits(tmp_path: Path) -> Path:
    """Two datasets as one dictionary."""
    both = {"train": datasets.Dataset.from_list(TRAIN), "test": datasets.Dataset.from_list(TEST)}
    datasets.DatasetDict(both).save_to_disk(str(tmp_path / "splits"))
    return tmp_path / "splits"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A directory as the hub has it: a card, and Parquet shards in `data/`."""
    directory = tmp_path / "repository"
    (directory / "data").mkdir(parents=True)
    (directory / "README.md").write_text(CARD)
    for name, rows in (("train", TRAIN), ("test", TEST)):
        half = len(rows) // 2
        for number, part in enumerate((rows[:half], rows[half:])):
            tiny.write_parquet(directory / "data" / f"{name}-{number:05}-of-00002.parquet", part)
    return directory


def test_a_saved_dataset_is_its_files_in_their_order(saved: Path) -> None:
    source = opened(saved)
    assert read_all(source) == TRAIN
    assert source.locate_row(9) == f"{saved}/data-00002-of-00003.arrow[2]"
    assert [file.identity.name for file in source.files] == [f"data-0000{number}-of-00003.arrow" for number in range(3)]


def test_a_saved_selection_is_the_rows_that_were_selected(tmp_path: Path) -> None:
    datasets.Dataset.from_list(TRAIN).select([7, 2, 2]).save_to_disk(str(tmp_path / "saved"))
    assert read_all(opened(tmp_path / "saved")) == [TRAIN[7], TRAIN[2], TRAIN[2]]


def test_mixed_tool_calls_of_a_saved_dataset_read_as_they_were(tmp_path: Path) -> None:
    calls = [{"name": "add", "arguments": {"a": 1}}], [{"name": "find", "arguments": {"text": "b"}}], None
    rows = [{"messages": [{"role": "assistant", "content": "c", "tool_calls": call}]} for call in calls]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    assert read_all(opened(tmp_path / "saved")) == [
        *rows[:2],
        {"messages": [{"role": "assistant", "content": "c"}]},
    ]


def test_a_split_of_a_saved_dictionary_is_named(splits: Path) -> None:
    assert read_all(opened(splits, split="train")) == TRAIN
    assert read_all(opened(splits, split="test")) == TEST
    assert refusal(splits) == (f"source '{splits}' has several splits; set split to one of 'train', 'test'")
    assert refusal(splits, split="dev") == f"source '{splits}' has no split 'dev'; set split to one of 'train', 'test'"


@pytest.mark.parametrize(
    "split",
    ["train[:2]", "train[2:]", "train[-1:]", "train[:50%]", "train[25%:75%]", "train+test", "test[1:]+train[:1]"],
)
def test_slices_of_saved_splits_are_those_of_datasets(splits: Path, split: str) -> None:
    names = {name: datasets.load_from_disk(str(splits / name)) for name in ("train", "test")}
    sizes = {name: len(rows) for name, rows in names.items()}
    parts = datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
    everything = {"train": TRAIN, "test": TEST}
    expected = [row for part in parts for row in everything[part.splitname][part.from_ or 0 : part.to]]
    source = opened(splits, split=split)
    assert read_all(source) == expected
    assert sum(len(file) for file in source.files) == len(expected)


def test_a_slice_of_a_saved_dataset_is_named_in_its_identity_and_places(saved: Path) -> None:
    source = opened(saved, split="train[1:3]")
    assert read_all(source) == TRAIN[1:3]
    names = [identity.name for identity in source.identities]
    assert all(name.endswith(("[0:1]", "[1:2]", "[1:3]", "[0:2]")) for name in names), names
    assert source.locate_row(0).endswith("[1]") or source.locate_row(0).endswith("[0]")
    assert source.identities != opened(saved, split="train[2:4]").identities


@pytest.mark.parametrize("split", ["dev[:1]", "train[:x]", "[:1]", "train[:200%]"])
def test_a_slice_that_selects_nothing_known_is_refused(splits: Path, split: str) -> None:
    message = refusal(splits, split=split)
    assert message.startswith(f"source '{splits}' has no ")
    assert "\n" not in message


@pytest.mark.parametrize("layout", ["splits", "one", "repository"])
@pytest.mark.parametrize(
    "split", ["train[:0%]", "train[9:8]", "train[9:2]", "train[5000:]", "train[:-50]", "train[5000:]+train[4:2]"]
)
def test_a_split_that_selects_no_row_is_named_with_one_that_selects_all(
    tmp_path: Path, layout: str, split: str
) -> None:
    train = datasets.Dataset.from_list(TRAIN)
    if layout == "splits":
        datasets.DatasetDict(train=train).save_to_disk(str(tmp_path / layout))
    elif layout == "one":
        train.save_to_disk(str(tmp_path / layout))
    else:
        (tmp_path / layout).mkdir()
        tiny.write_jsonl(tmp_path / layout / "train.jsonl", TRAIN)
    assert refusal(tmp_path / layout, split=split) == (
        f"split = {split!r} selects none of the 10 rows of source '{tmp_path / layout}'; write split = 'train[0:10]' to "
        "select all of them, or fewer"
    )
    assert read_all(opened(tmp_path / layout, split="train[0:10]")) == TRAIN


@pytest.mark.parametrize("layout", ["saved", "repository"])
def test_a_split_without_rows_is_named(tmp_path: Path, layout: str) -> None:
    train, path = datasets.Dataset.from_list(TRAIN), tmp_path / layout
    both = {"train": train, "test": train.select(range(0))}
    if layout == "saved":
        datasets.DatasetDict(both).save_to_disk(str(path))
    else:
        path.mkdir()
        for name, rows in both.items():
            rows.to_parquet(str(path / f"{name}.parquet"))
    for split in ("test", "test[:5]"):
        assert refusal(path, split=split) == (
            f"split = {split!r} of source '{path}' holds no row; set split to rows of another split, or remove the source"
        )
    assert refusal(path, split="test+train[7:3]") == (
        f"split = 'test+train[7:3]' selects none of the 10 rows of source '{path}'; write split = 'train[0:10]' to select "
        "all of them, or fewer"
    )
    assert read_all(opened(path, split="test+train[:2]+train[7:3]")) == TRAIN[:2]


def test_a_slice_cannot_be_streamed(splits: Path) -> None:
    with pytest.raises(ValueError, match=r"is streamed, and split = 'train\[:2\]' selects rows by number; leave out"):
        StreamedSource(SourceConfig(path=str(splits), split="train[:2]", streaming=True, shuffle=False))


def test_the_only_split_of_a_saved_dictionary_need_not_be_named(tmp_path: Path) -> None:
    datasets.DatasetDict(train=datasets.Dataset.from_list(TRAIN)).save_to_disk(str(tmp_path / "one"))
    assert read_all(opened(tmp_path / "one")) == TRAIN


def test_a_split_of_one_saved_dataset_is_refused(saved: Path) -> None:
    assert refusal(saved, split="train") == (
        f"source '{saved}' is a saved dataset without splits; leave out split = 'train'"
    )


@pytest.mark.parametrize("field", ["subset", "revision"])
def test_a_subset_or_revision_of_a_saved_dataset_is_refused(saved: Path, field: str) -> None:
    assert refusal(saved, **{field: "x"}) == (
        f"source '{saved}' was written by save_to_disk, for which {field} = 'x' has no meaning; leave {field} out"
    )


def test_a_missing_file_of_a_saved_dataset_is_refused_by_name(saved: Path) -> None:
    (saved / "data-00001-of-00003.arrow").unlink()
    assert refusal(saved) == (
        f"source '{saved}' lacks data-00001-of-00003.arrow, one of 3 files in the list of state.json; restore the file"
    )


def test_an_empty_file_of_a_saved_dataset_is_refused_by_name(saved: Path) -> None:
    os.truncate(saved / "data-00001-of-00003.arrow", 0)
    assert refusal(saved) == f"{saved}/data-00001-of-00003.arrow is empty; remove the file or write it again"


@pytest.mark.parametrize("name", ["../data-00000-of-00003.arrow", "/etc/passwd", "..", ""])
def test_a_saved_dataset_names_no_file_outside_of_it(saved: Path, name: str) -> None:
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    assert (
        refusal(saved)
        == f"source '{saved}' lists {name!r}, not the name of a file in the directory; save the dataset again"
    )


def test_a_saved_dataset_whose_order_lies_elsewhere_is_refused(saved: Path) -> None:
    state = json.loads((saved / "state.json").read_text())
    (saved / "state.json").write_text(json.dumps(state | {"_indices_data_files": [{"filename": "indices.arrow"}]}))
    assert (
        refusal(saved)
        == f"source '{saved}' stores the order of its rows in a separate file; call flatten_indices() on the dataset "
        "and save it again"
    )


def test_a_list_of_files_that_is_none_is_refused(saved: Path) -> None:
    (saved / "state.json").write_text("{}")
    assert refusal(saved) == (
        f"{saved}/state.json is damaged or was not written by save_to_disk: Object missing required field `_data_files`; "
        "write the dataset again"
    )


def test_a_directory_with_a_state_of_something_else_is_its_files(tmp_path: Path) -> None:
    tiny.write_jsonl(tmp_path / "a.jsonl", TEST)
    (tmp_path / "state.json").write_text('{"step": 1}')
    assert read_all(opened(tmp_path)) == [*TEST, {"step": 1}]


@pytest.mark.parametrize("fields", [{}, {"streaming": True, "shuffle": False}])
def test_a_directory_of_arrow_files_without_their_list_is_refused_by_name(
    tmp_path: Path, saved: Path, fields: dict[str, Any]
) -> None:
    moved = saved.rename(tmp_path / "a [b]*")
    (moved / "state.json").rename(tmp_path / "state.json")
    open_source = StreamedSource if fields else FileSet
    with pytest.raises(ValueError, match=r"^source ") as error:
        open_source(SourceConfig(path=str(moved), **fields))
    glob = f"{tmp_path}/a [[]b][*]/data-*-of-00003.arrow"
    assert str(error.value) == (
        f"source '{moved}' has dataset_info.json and Arrow files (3), but no state.json that lists the files with its rows; "
        f"restore state.json, or name the files, such as path = '{glob}'"
    )
    assert read_all(opened(glob)) == TRAIN
    (tmp_path / "state.json").rename(moved / "state.json")
    assert read_all(opened(moved)) == TRAIN


def test_a_directory_of_the_cache_of_datasets_is_not_read_as_a_whole(tmp_path: Path) -> None:
    """It holds all splits, and results of `map`."""
    (tmp_path / "rows").mkdir()
    tiny.write_jsonl(tmp_path / "rows" / "train.jsonl", TRAIN)
    tiny.write_jsonl(tmp_path / "rows" / "test.jsonl", TEST)
    both = datasets.load_dataset(str(tmp_path / "rows"), cache_dir=str(tmp_path / "cache"))
    both["train"].map(lambda row: row)
    (info,) = (tmp_path / "cache").rglob("dataset_info.json")
    said = refusal(info.parent)
    assert said.endswith(f"or name the files, such as path = '{info.parent}/rows-train.arrow'")
    assert read_all(opened(info.parent / "rows-train.arrow")) == TRAIN


def test_a_saved_dataset_without_its_description_is_refused(saved: Path) -> None:
    (saved / "dataset_info.json").rename(saved.parent / "dataset_info.json")
    assert refusal(saved, split="train") == (
        f"source '{saved}' has state.json, as save_to_disk writes, but no dataset_info.json; restore dataset_info.json, or "
        "leave out split and name the Arrow files by a glob"
    )
    assert refusal(saved).startswith(f"{saved}/state.json describes a dataset and holds no row; ")
    assert read_all(opened(saved / "*.arrow")) == TRAIN
    (saved.parent / "dataset_info.json").rename(saved / "dataset_info.json")
    assert read_all(opened(saved)) == TRAIN


def test_a_saved_dataset_may_move(saved: Path, tmp_path: Path) -> None:
    before = [file.identity for file in opened(saved).files]
    moved = shutil.copytree(saved, tmp_path / "moved")
    assert [file.identity for file in opened(moved).files] == before


def test_a_directory_like_one_of_the_hub_is_read_by_split_and_subset(repository: Path) -> None:
    source = opened(repository, subset="whole", split="train")
    assert read_all(source) == TRAIN
    assert source.locate_row(7) == f"{repository}:train[7]"
    assert read_all(pickle.loads(pickle.dumps(source))) == TRAIN
    assert read_all(opened(repository, subset="small")) == TEST
    assert read_all(opened(repository, subset="whole", split="train[2:4]+test")) == [*TRAIN[2:4], *TEST]


def test_a_directory_whose_card_has_splits_is_not_read_as_loose_files(repository: Path) -> None:
    tiny.write_jsonl(repository / "extra.jsonl", TEST)
    assert refusal(repository).startswith(
        f"source '{repository}' cannot be read as a dataset (subset = None, split = None, revision = None): "
        "Config name is missing. Please pick one among the available configs: ['whole', 'small']"
    )
    assert refusal(repository, subset="whole") == (
        f"source '{repository}' has several splits; set split to one of 'train', 'test'"
    )
    (repository / "README.md").write_text("Dialogues.\n")
    assert read_all(opened(repository)) == TEST


WAYS = {
    "one path": "data_files: extra/x.jsonl",
    "a list of paths and globs": "data_files:\n  - extra/x.jsonl\n  - data/test-*",
    "a directory": "data_dir: extra",
    "a deep glob": "data_files: '**/*.jsonl'",
    "splits": "data_files:\n  - split: train\n    path: [data/train-*, extra/*]",
    "an alias": "data_files: &files extra/*\n- config_name: other\n  data_files: *files",
    "a merged object": "<<: {data_files: extra/*}",
}


@pytest.mark.parametrize("card", ["README.md", ".huggingface.yaml", "byte order mark", "carriage returns"])
@pytest.mark.parametrize("way", WAYS)
def test_each_way_of_a_card_to_name_files_gives_the_rows_of_datasets(tmp_path: Path, way: str, card: str) -> None:
    for name in ("data/train-00000-of-00001", "data/test-00000-of-00001", "extra/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        tiny.write_jsonl(
            tmp_path / f"{name}.jsonl", [{"prompt": f"{name} {row}", "completion": "x"} for row in range(2)]
        )
    yaml = f"configs:\n- config_name: first\n  {WAYS[way]}\n"
    if card == ".huggingface.yaml":
        (tmp_path / card).write_text(yaml)
    else:
        text = f"---\n{yaml}---\nWords.\n".replace("\n", "\r\n" if card == "carriage returns" else "\n")
        (tmp_path / "README.md").write_bytes(text.encode("utf-8-sig" if card == "byte order mark" else "utf-8"))
    expected = datasets.load_dataset(str(tmp_path), "first", split="train", cache_dir=str(tmp_path / "cache")).to_list()
    assert read_all(opened(tmp_path, subset="first", split="train")) == expected
    source = SourceConfig(path=str(tmp_path), subset="first", split="train", streaming=True)
    files = StreamedSource(source)
    streamed = [decode_row(row()) for file in range(files.file_count) for row in files.open(file, 0).rows]
    assert streamed == expected
    assert refusal(tmp_path, subset="nothing").startswith(f"source '{tmp_path}' cannot be read as a dataset")
    if way not in ("an alias", "a directory"):
        assert is_repository(tmp_path)
        assert read_all(opened(tmp_path)) == expected


@pytest.mark.parametrize(
    ("settings", "content", "said"),
    [
        ("sep: ';'", "prompt;completion\na;b\n", "sep = ';'"),
        ("header: null\n  names: [prompt, completion]", "a,b\n", "header = None, names = ['prompt', 'completion']"),
    ],
)
def test_settings_of_a_card_are_applied_or_the_source_cannot_be_streamed(
    tmp_path: Path, settings: str, content: str, said: str
) -> None:
    (tmp_path / "a.csv").write_text(content)
    (tmp_path / "README.md").write_text(
        f"---\nconfigs:\n- config_name: default\n  data_files: a.csv\n  {settings}\n---\n"
    )
    assert read_all(opened(tmp_path)) == [{"prompt": "a", "completion": "b"}]
    with pytest.raises(ValueError, match=r".") as error:
        StreamedSource(SourceConfig(path=str(tmp_path), streaming=True))
    assert str(error.value) == (
        f"source '{tmp_path}' is streamed, and its dataset card sets {said}, which only the library datasets applies; "
        "leave out streaming"
    )


def test_a_repository_of_tab_separated_values_can_be_streamed(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text("prompt\tcompletion\na\tb\n")
    source = StreamedSource(SourceConfig(path=str(tmp_path), split="train", streaming=True))
    assert [row() for row in source.open(0, 0).rows] == [{"prompt": "a", "completion": "b"}]


def test_an_unknown_split_or_subset_is_refused_in_the_words_of_datasets(repository: Path) -> None:
    assert refusal(repository, subset="whole", split="dev") == (
        f"source '{repository}' cannot be read as a dataset (subset = 'whole', split = 'dev', revision = None): "
        "Unknown split \"dev\". Should be one of ['train', 'test']."
    )
    assert refusal(repository, subset="large", split="dev") == (
        f"source '{repository}' cannot be read as a dataset (subset = 'large', split = 'dev', revision = None): "
        "BuilderConfig 'large' not found. Available: ['whole', 'small']"
    )


def test_splits_are_found_by_the_names_of_files_too(tmp_path: Path) -> None:
    tiny.write_jsonl(tmp_path / "train.jsonl", TRAIN)
    tiny.write_jsonl(tmp_path / "test.jsonl", TEST)
    assert read_all(opened(tmp_path, split="test")) == TEST


def test_what_a_directory_holds_now_is_read_whatever_is_in_the_cache(repository: Path) -> None:
    shard = repository / "data" / "test-00001-of-00002.parquet"
    before = shard.stat()
    assert read_all(opened(repository, subset="small")) == TEST
    tiny.write_parquet(shard, TRAIN[:2])
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert read_all(opened(repository, subset="small")) == [*TEST[:2], *TRAIN[:2]]


def test_a_missing_shard_of_a_directory_like_one_of_the_hub_is_refused_by_name(repository: Path) -> None:
    (repository / "data" / "train-00000-of-00002.parquet").unlink()
    assert refusal(repository, subset="whole", split="train") == (
        f"{repository} lacks 1 of 2 files, first data/train-00000-of-00002.parquet; "
        "restore the files, or name the present files by a glob"
    )


def test_a_broken_shard_is_refused(repository: Path) -> None:
    (repository / "data" / "train-00000-of-00002.parquet").write_bytes(b"PAR1 and nothing else")
    assert refusal(repository, subset="whole", split="train").startswith(
        f"source '{repository}' cannot be read as a dataset (subset = 'whole', split = 'train', revision = None): "
    )


def test_a_revision_of_a_local_directory_is_refused(repository: Path) -> None:
    assert refusal(repository, subset="whole", split="train", revision="main") == (
        f"source '{repository}' is a directory, for which revision = 'main' has no meaning; leave revision out"
    )


def test_a_hub_name_that_is_nothing_here_is_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = refusal("nobody/nothing", split="train", revision="v1", subset="x")
    assert said.startswith(
        "source 'nobody/nothing' cannot be read as a dataset of the hub, and matches no local path from "
        f"{tmp_path} (subset = 'x', split = 'train', revision = 'v1'): "
        "Couldn't reach 'nobody/nothing' on the Hub"
    )
    (tmp_path / "nobody").mkdir()
    tiny.write_jsonl(tmp_path / "nobody" / "nothing", [])
    assert refusal("nobody/nothing").startswith("nobody/nothing has the unknown suffix ''")


def test_a_missing_file_is_not_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal("data/chats.jsonl") == (
        f"source 'data/chats.jsonl' matches no file (looked from {tmp_path}); correct the path"
    )


def identity(path: Path, **fields: Any) -> Any:
    (file,) = opened(path, **fields).files
    return file.identity


def test_the_identity_of_a_loaded_dataset_is_that_of_its_rows(repository: Path, tmp_path: Path) -> None:
    before = identity(repository, subset="whole", split="train")
    assert before.name == "repository:train"
    assert (
        identity(shutil.copytree(repository, tmp_path / "there" / "repository"), subset="whole", split="train")
        == before
    )
    again = tmp_path / "again" / "repository"
    again.mkdir(parents=True)
    tiny.write_parquet(again / "train.parquet", TRAIN)
    assert identity(again, split="train") == before
    assert identity(repository, subset="whole", split="train[:5]") != before
    first, second = (identity(repository, subset="whole", split=split) for split in ("train[:2]", "train[2:4]"))
    assert first.sha256 != second.sha256
    tiny.write_parquet(again / "train.parquet", [*TRAIN[:3], tiny.chat("other", "words"), *TRAIN[4:]])
    assert identity(again, split="train").sha256 != before.sha256


def test_the_identity_of_a_huge_loaded_dataset_is_taken_from_its_ends_and_even_places_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "SAMPLED_ABOVE", 100)
    monkeypatch.setattr(hub, "_SLICE", 1)
    rows = [{"n": number} for number in range(1000)]
    seen = set()
    for changed in (None, 0, 1, 999 * 64 // 127, 999):
        content = [{"n": -1} if number == changed else row for number, row in enumerate(rows)]
        tiny.write_jsonl(tmp_path / "train.jsonl", content)
        seen.add(identity(tmp_path, split="train").sha256)
    assert len(seen) == 4
