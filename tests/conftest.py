"""Fixtures that all tests share. Nothing here reaches a network or a cache outside the test run's own directory."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path

# Before the libraries are imported: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["SFTSTREAM_CACHE"] = tempfile.mkdtemp(prefix="sftstream-tests-")
os.environ["HF_DATASETS_CACHE"] = os.path.join(os.environ["SFTSTREAM_CACHE"], "datasets")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import tiny
import torch
from hypothesis import settings

from sftstream import ChatEncoder, DataConfig
from sftstream.sources import Corpus, CorpusReader
from sftstream.streaming.example_reader import ExampleReader

# A shell ignores Ctrl-C in commands that it starts in the background, and so do their children.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The load of the machine decides how long an example takes, and may not fail a test.
settings.register_profile("sftstream", deadline=None)
settings.load_profile("sftstream")

REALDATA = Path(os.environ.get("SFTSTREAM_REALDATA") or Path(__file__).resolve().parents[2] / "shared" / "data")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    shutil.rmtree(os.environ["SFTSTREAM_CACHE"])


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The directory of a byte-level tokenizer with a chat template."""
    return tiny.save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def encoder(tokenizer: str) -> ChatEncoder:
    return ChatEncoder(tokenizer)


@pytest.fixture(scope="session")
def corpus_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """48 conversations as JSON lines."""
    return tiny.write_jsonl(tmp_path_factory.mktemp("corpus") / "dialogues.jsonl", tiny.rows(48))


@pytest.fixture(scope="session")
def config(tokenizer: str, corpus_path: str) -> DataConfig:
    """Two epochs of 48 conversations in four streams."""
    return tiny.data_config(tokenizer, corpus_path)


@pytest.fixture(scope="session")
def stages(config: DataConfig, encoder: ChatEncoder) -> ExampleReader:
    return ExampleReader(CorpusReader(Corpus(config.sources)), encoder)


@pytest.fixture
def started() -> tiny.Started:
    """The running processes that the test has started; fixtures of other files may have some of their own."""
    before = set(multiprocessing.active_children())
    return lambda: [process for process in multiprocessing.active_children() if process not in before]


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """The address of a web server on this machine that shows `tmp_path`."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(tiny.WebFiles, directory=str(tmp_path))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="session")
def realdata() -> Path:
    """Real conversations, tokenizers and templates, which are no part of the project."""
    if not REALDATA.is_dir():
        pytest.skip(f"no real data at {REALDATA}; SFTSTREAM_REALDATA names its directory")
    return REALDATA
