"""Single files of the hub, asked for the way its own client does: HF_ENDPOINT, proxies, offline."""

from __future__ import annotations

import re
from pathlib import Path

HUB_TIMEOUT = 3  # seconds until the hub counts as out of reach, where HF_HUB_ETAG_TIMEOUT isn't set
AWAY = (502, 503, 504)  # what a gateway answers for a hub that isn't there

_asked: dict[str, str | None] = {}  # by endpoint: why it can't be reached


def hub_file(name: str, file: str, revision: str | None = None) -> Path:
    """A file of a hub id, fetched where the hub has a newer one than its cache; from the cache
    where it is out of reach.

    Raises:
        LookupError: the hub, or what is cached of it, has no such file.
        OSError: neither the hub nor its cache can be asked. Raised soon.
    """
    from huggingface_hub import (
        _CACHED_NO_EXIST,
        constants,
        hf_hub_download,
        hf_hub_url,
        try_to_load_from_cache,
    )
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    why: str | None = "HF_HUB_OFFLINE is set"
    if not constants.HF_HUB_OFFLINE:
        why = _out_of_reach(constants.ENDPOINT, hf_hub_url(name, file, revision=revision))
    if why is None:
        try:
            return Path(hf_hub_download(name, file, revision=revision, etag_timeout=HUB_TIMEOUT))
        except LocalEntryNotFoundError as error:  # it broke off, and isn't in the cache
            why = f"{_place(constants.ENDPOINT)} gave no answer that is a hub's"
            why += f" ({_reason(error.__cause__ or error)})"
        except EntryNotFoundError as error:
            raise LookupError(f"{name} has no {file}") from error
    cached = try_to_load_from_cache(name, file, revision=revision)
    if isinstance(cached, str):
        return Path(cached)
    if cached is _CACHED_NO_EXIST:
        raise LookupError(f"{name} has no {file}")
    raise OSError(f"{why}, and {file} is not in the cache")


def _out_of_reach(endpoint: str, url: str) -> str | None:
    """Why the hub doesn't answer soon, None where it does. Its client's own retries would take half
    a minute.
    """
    if endpoint not in _asked:
        _asked[endpoint] = _ask(endpoint, url)
    return _asked[endpoint]


def _ask(endpoint: str, url: str) -> str | None:
    from huggingface_hub import constants, get_session

    asked = constants.HF_HUB_ETAG_TIMEOUT
    timeout = HUB_TIMEOUT if asked == constants.DEFAULT_ETAG_TIMEOUT else asked
    try:
        status = get_session().head(url, timeout=timeout, follow_redirects=False).status_code
    except Exception as error:  # of whichever HTTP library it has
        return f"{_place(endpoint)} can't be reached ({_reason(error)})"
    return f"{_place(endpoint)} can't be reached ({status})" if status in AWAY else None


def _place(url: str) -> str:
    """An endpoint without its password, and without what all of them have."""
    return re.sub(r"^https://|(?<=//)[^/@]*@", "", url)


def _reason(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return re.sub(r"(?<=//)[^/@\s]*@", "", text[0]) if text else type(error).__name__
