"""Repositories on the Hub: names, the right to write, and errors in one line that say what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import httpx, validate_repo_id

Kind = Literal["model", "dataset", "space"]


class HubError(ValueError):
    """What could not be published or read: what was expected, what was found, how to mend it. One line."""


def create_repository(repository: str, kind: Kind = "model", *, private: bool = False, sdk: str | None = None) -> str:
    """Makes sure that a repository is there which we may write to; returns its address.

    Raises  HubError, among others if it is to be private and is there already for all to see
    """
    check_name(repository)
    with explained(f"{repository} cannot be published to"):
        hub = HfApi()
        url = hub.create_repo(repository, repo_type=kind, private=private or None, exist_ok=True, space_sdk=sdk)
        # One that is there already is no proof.
        hub.auth_check(repository, repo_type=kind, write=True)
        if private and not hub.repo_info(repository, repo_type=kind).private:
            raise HubError(
                f"{repository} is there already and public, where a private one was asked for. Make it private in its "
                "settings, pass another name, or leave --private out."
            )
    return str(url)


def check_name(repository: str) -> None:
    """Raises HubError for what cannot be the name of a repository."""
    if not is_name(repository):
        raise HubError(
            f"A repository is named organization/name, of letters, digits, '-', '_' and '.'; found {repository!r}."
        )


def is_name(text: str) -> bool:
    """Whether a text can be the name of a repository, of the form organization/name."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return text.count("/") == 1


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Turns what goes wrong while a model is read from a repository into a HubError; other errors pass.

    path  a local folder, or the name of a repository
    """
    try:
        yield
    except (OSError, ValueError, TypeError) as error:
        # Of a tokenizer whose files are out of reach, transformers makes an error of its own kind.
        reason = None if Path(path).exists() or not is_name(path) else _reading_reason(path, error)
        if reason is None:
            raise
        raise HubError(reason) from error


def _reading_reason(path: str, error: BaseException) -> str | None:
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    unreachable = (
        f"{path} is no folder here, is not in the cache, and the Hub cannot be reached (or HF_HUB_OFFLINE is set). "
        "Load it once while online, or pass a local folder."
    )
    for cause in causes:
        if isinstance(cause, GatedRepoError):
            return f"{path} is gated: ask for access on its page on the Hub, then run `hf auth login`."
        if isinstance(cause, RepositoryNotFoundError):
            return (
                f"{path} is no folder here, and the Hub shows no such repository: it is misspelt, or private. Check "
                "the name; for a private one, run `hf auth login` with a token that may read it."
            )
        if isinstance(cause, OfflineModeIsEnabled | LocalEntryNotFoundError):
            return unreachable
    cached = isinstance(try_to_load_from_cache(path, "config.json"), str)
    return unreachable if constants.HF_HUB_OFFLINE and not cached else None


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turns what goes wrong on the way to the Hub into a HubError of one line that begins with `what`."""
    try:
        yield
    except HubError:
        raise
    except OfflineModeIsEnabled as error:
        raise HubError(f"{what}: HF_HUB_OFFLINE is set. Unset it.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        reasons = {
            401: "the Hub knows no such token, or none was given. Run `hf auth login` with one that may write",
            403: "the token may not write there. Take one with write access to that organization: `hf auth login`",
            404: "the Hub shows no such repository to this token. Check the name and `hf auth whoami`",
        }
        said = " ".join((error.server_message or str(error)).split()).rstrip(".")
        raise HubError(f"{what}: {reasons.get(status, said)} (status {status}).") from error
    except (httpx.HTTPError, OSError, RuntimeError, ValueError) as error:
        raise HubError(f"{what}: {one_line(error)}. Run the same again: what has arrived is not sent twice.") from error


def one_line(error: BaseException) -> str:
    """What an error says, without its line breaks."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
