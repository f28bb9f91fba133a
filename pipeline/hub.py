"""What can go wrong in asking a hub, each in one message: a name that it does not know, a licence, the network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from pipeline.errors import PipelineError, UserError

_SECONDS = 10  # that a hub may take to answer at all


@cache
def reach_hub() -> str:
    """Ask whether the hub answers, whatever it says. Returns why it cannot be reached; "" if it can.

    If it does not, its library is told to look into its cache alone: else it asks for every file six times, which takes
    half a minute each.
    """
    import httpx
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:  # its library then says so at once
        return ""
    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as error:
        constants.HF_HUB_OFFLINE = True
        return str(error) or type(error).__name__
    except (httpx.HTTPError, httpx.InvalidURL):  # whatever else is wrong its library finds out, and says
        pass
    return ""


@contextmanager
def asking(key: str, name: str, revision: str | None, instead: str) -> Iterator[None]:
    """Turn what the hub's library raises into this program's errors.

    Args:
        key: the key of the configuration that named it.
        name: the hub id.
        revision: its branch, tag or commit; None for the main branch.
        instead: what may be given without a network.

    Raises:
        UserError: the hub does not have it, or does not give it.
        PipelineError: the hub cannot be reached.
    """
    from huggingface_hub import errors

    at = f"{name} at {revision}" if revision else name
    why = reach_hub()
    try:
        yield
    except PipelineError:
        raise
    except errors.GatedRepoError:
        raise UserError(
            f"{key}: {at} is gated: accept its licence on its hub page, then log in with "
            "`hf auth login` or set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{key}: the hub has no {name}, or shows it only to those who are logged in: check the "
            "name, or log in with `hf auth login` or set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{key}: {name} has no revision {revision}") from None
    except (errors.HFValidationError, errors.HfUriError) as error:
        raise UserError(f"{key}: {name} is no hub id: {error}") from None
    except Exception as error:  # the network's errors have no common class, and must not show a traceback
        reason = why or str(error).strip().partition("\n")[0] or type(error).__name__
        raise PipelineError(
            f"{key}: {at} cannot be fetched from the hub and is not in its cache ({reason}). Connect to "
            f"the network, or give {instead}"
        ) from None
