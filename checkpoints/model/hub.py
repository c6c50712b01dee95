"""Upload a step as a model to the Hugging Face hub, in a single commit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import msgspec

from checkpoints.errors import CheckpointError, one_line
from checkpoints.model.card import ORIGIN, License, model_card, parse_origin

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    from checkpoints.store import CheckpointStore

CARD = "README.md"
WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
"""Files that a commit replaces as a whole: a model never has shards of two commits."""
_BEGUN = {".gitattributes"}
"""Files of a repository that was made and holds no model yet."""


def push(
    store: CheckpointStore,
    step: int,
    repository: str,
    license: License,
    *,
    private: bool = False,
    update: bool = False,
    merged: bool = False,
    base: Path | None = None,
) -> str:
    """Export a step and upload it with a model card; return the URL of the commit.

    The token is that of `hf auth login` or HF_TOKEN. `private` applies to a new repository.
    `update` adds a commit to a repository that holds files. `merged` and `base` are those of
    `CheckpointStore.export`.

    Raises CheckpointError if the step cannot be exported, the hub refuses the token or the name,
    the repository holds files already, or the connection fails.
    """
    if repository.count("/") != 1:
        raise CheckpointError(f"{repository!r} is no name of a repository; give organisation/name")
    from huggingface_hub import HfApi

    api = HfApi()
    with _errors_of(repository):
        _require_free(api, repository, update=update)
    with TemporaryDirectory(prefix="push-") as directory:
        out = Path(directory) / "model"
        store.export(step, out, merged=merged, base=base)
        saved = store.values(step, ORIGIN).get(ORIGIN)
        origin = None if saved is None else parse_origin(saved)
        if origin is not None and merged:
            origin = msgspec.structs.replace(origin, adapter=False)
        card = model_card(repository.partition("/")[2], store.manifest(step), origin, license)
        (out / CARD).write_text(card, encoding="utf-8")
        with _errors_of(repository):
            api.create_repo(repository, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repository, folder_path=out, commit_message=f"Step {step}", delete_patterns=WEIGHTS
            )
    return str(commit.commit_url)


def _require_free(api: HfApi, repository: str, *, update: bool) -> None:
    """Raise CheckpointError if the token is not valid or, without `update`, the name is taken."""
    from huggingface_hub.errors import RepositoryNotFoundError

    api.whoami()
    try:
        held = set(api.list_repo_files(repository)) - _BEGUN
    except RepositoryNotFoundError:
        return
    if held and not update:
        raise CheckpointError(
            f"{repository} exists and holds {len(held)} files, such as {min(held)}; push to another name, or add a commit "
            "with --update"
        )


@contextmanager
def _errors_of(repository: str) -> Iterator[None]:
    """Turn the errors of the hub and of the network into CheckpointError, in one line."""
    from huggingface_hub import errors
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    network: type[Exception] = errors.HTTPError  # type: ignore[attr-defined] # of the hub's HTTP client
    try:
        yield
    except CheckpointError:
        raise
    except LocalTokenNotFoundError:
        raise CheckpointError("no token for the hub; run `hf auth login`, or set HF_TOKEN") from None
    except HFValidationError as error:
        raise CheckpointError(
            f"{repository!r} is no name of a repository: {one_line(error)}; give organisation/name"
        ) from error
    except HfHubHTTPError as error:
        raise CheckpointError(_refusal(repository, error)) from error
    except KeyboardInterrupt:
        raise CheckpointError(f"interrupted before the hub confirmed a commit to {repository}; {_AGAIN}") from None
    except (OSError, network, RuntimeError, ValueError) as error:
        cause = error.__cause__ or error
        raise CheckpointError(
            f"the upload to {repository} failed before the hub confirmed a commit: {one_line(cause).rstrip('.')}; {_AGAIN}"
        ) from error


_AGAIN = "the same command tries again, and does not send files that arrived"


def _refusal(repository: str, error: HfHubHTTPError) -> str:
    """Return the message for an answer of the hub with an error status."""
    status = 0 if error.response is None else error.response.status_code
    if status == 401:
        return "the hub refuses the token; run `hf auth login` anew, or set HF_TOKEN to a token that may write"
    if status == 403:
        return f"the token may not write to {repository}; use a token with write access, or another organisation"
    reason = one_line(error).partition(" (Request ID")[0]
    return f"the hub refuses {repository}: {reason}; {_AGAIN}"
