"""Whether the Hugging Face Hub can be reached."""

from huggingface_hub import constants
from huggingface_hub.utils import get_session


def hub_problem(timeout: float = 5.0) -> str | None:
    """Return why the Hugging Face Hub cannot be reached, or None if it answers.

    Asks once, through the Hub's own client, so that proxies, mirrors and offline mode count. Left to themselves,
    `datasets` and `transformers` retry for 25 seconds or more.

    Args:
        timeout: seconds to wait for a connection to one address, and then for an answer.
    """
    try:
        get_session().head(constants.ENDPOINT, timeout=timeout)
    except Exception as error:  # the client's HTTP library, and with it the error's type, differs by version
        return " ".join(str(error).split())[:300] or type(error).__name__
    return None
