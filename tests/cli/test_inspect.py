"""`sftstream inspect` and `diff` on state files, checkpoints and runs, and `read_state` in Python."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import msgspec
import pytest
import tiny
from commands import run
from moto.server import ThreadedMotoServer

from sftstream import DataState, PackLoader, describe, diff, read_state, summarize
from sftstream.cli.main import main


def test_a_run_a_checkpoint_and_its_directory_hold_the_same_state(desk: Path) -> None:
    newest = desk / "runs/first/checkpoints/step-00000004"
    states = [read_state(path) for path in (desk / "runs/first", newest.parent, newest, f"{newest}/")]
    assert all(diff(states[0], state) == [] for state in states)
    assert states[0].packs == 8
    assert read_state(desk / "state.json").packs == 4
    assert isinstance(states[0], DataState)


def test_a_state_continues_with_the_pack_after_it(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk)
    from sftstream.toml_file import read_data_config

    config = read_data_config(Path("run.toml"), [])
    whole = PackLoader(config, workers=0)
    packs = tiny.take(whole, 8)
    resumed = PackLoader(config, workers=0, state=read_state("runs/first/checkpoints/step-00000002"))
    assert tiny.digests(tiny.take(resumed, 4)) == tiny.digests(packs[4:])


def test_inspect_shows_streams_sources_refusals_and_identity(desk: Path) -> None:
    printed = run(main, "inspect", desk / "runs/first").stdout
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert lines[0] == f"checkpoint of step 4 in {desk}/runs/first/checkpoints"
    assert lines[1] == "pack 8 is next, after 4 steps of 2 packs; streams here: 2 of 2"
    assert "source files rows drawn epochs conversations tokens trained refused" in lines
    assert any(line.startswith("0 chats.jsonl 61 ") for line in lines)
    assert any(line.startswith("stream packs windows") for line in lines)
    assert "capacity: 256" in lines


def test_the_json_of_inspect_counts_what_the_state_counts(desk: Path) -> None:
    state = read_state(desk / "runs/first")
    found = json.loads(run(main, "inspect", desk / "runs/first", "--json").stdout)
    assert found["packs"] == 8
    assert found["steps"] == 4
    assert [stream["number"] for stream in found["streams"]] == [0, 1]
    assert sum(stream["packs"] for stream in found["streams"]) == found["returned_packs"] == 8
    (source,) = found["sources"]
    assert (source["files"], source["rows"]) == (["chats.jsonl"], 61)
    assert source["drawn"] == sum(stream.drawn[0] for stream in state.streams.values())
    assert source["accepted"][0] + sum(source["refused"].values()) == source["drawn"]
    assert source["share"] == {"conversations": 1.0, "tokens": 1.0, "trained_tokens": 1.0}
    assert found["tokens"] == summarize(state).tokens == sum(s.tokens for s in state.streams.values())
    assert found["identity"]["capacity"] == "256"


def test_diff_of_two_checkpoints_names_each_field(desk: Path) -> None:
    steps = [desk / f"runs/first/checkpoints/step-0000000{step}" for step in (2, 4)]
    result = run(main, "diff", *steps)
    assert result.exit_code == 1
    assert "state.packs: 4 -> 8" in result.stdout.splitlines()
    assert json.loads(run(main, "diff", *steps, "--json").stdout)["differences"] == result.stdout.splitlines()
    same = run(main, "diff", desk / "runs/first", steps[1], "--json")
    assert (same.exit_code, json.loads(same.stdout)) == (0, {"equal": True, "differences": []})


def test_a_damaged_checkpoint_is_an_error_that_names_the_file(desk: Path, tmp_path: Path) -> None:
    shutil.copytree(desk / "runs/first/checkpoints/step-00000004", tmp_path / "step-00000004")
    values = tmp_path / "step-00000004/rank00000.values"
    content = bytearray(values.read_bytes())
    content[len(content) // 2] ^= 1
    values.write_bytes(content)
    result = run(main, "inspect", tmp_path / "step-00000004")
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"{values} does not match its SHA-256" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["", "step-00000007", "nowhere"])
def test_a_path_without_a_state_is_an_error_with_a_remedy(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    result = run(main, "inspect", tmp_path / "empty" / name)
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert str(tmp_path) in result.stderr


def test_a_state_is_read_from_an_object_store_named_by_the_run(
    desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory of the run is local, its checkpoints are in a bucket, as `checkpoint.root` says."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    try:
        bucket = fsspec.filesystem("s3", skip_instance_cache=True)
        bucket.mkdir("inspected")  # the servers of a process share their buckets
        program = (
            "import sys; from checkpoints import CheckpointStore\n"
            "old, new = CheckpointStore(sys.argv[1]), CheckpointStore(sys.argv[2])\n"
            "new.save(4, {}, old.values(4)); new.close()"
        )
        root = "s3://inspected/first"
        local = desk / "runs/first/checkpoints"
        subprocess.run([sys.executable, "-c", program, str(local), root], check=True, timeout=120)
        (tmp_path / "run.json").write_bytes(msgspec.json.encode({"token": "0" * 32, "checkpoints": root}))
        expected = describe(read_state(local))
        for path in (tmp_path, root, f"{root}/step-00000004"):
            assert describe(read_state(path)) == expected
    finally:
        server.stop()


def test_reading_a_state_loads_no_weights_and_starts_no_process_group(desk: Path, tmp_path: Path) -> None:
    """The files of the tensors may even be missing."""
    shutil.copytree(desk / "runs/first/checkpoints/step-00000004", tmp_path / "step-00000004")
    (tmp_path / "step-00000004/rank00000.safetensors").unlink()
    assert read_state(tmp_path / "step-00000004").packs == 8
