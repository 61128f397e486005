"""Checks of the settings of rewards that run answers or ask a server, if a reward names them. Pure."""

import math
import re
from urllib.parse import urlsplit

from megatron_fipo.config.reward_keys import reward_keys
from megatron_fipo.config.schema import Config
from megatron_fipo.errors import UserError
from megatron_fipo.field_rules import sum_terms
from megatron_fipo.secrecy import has_password

REQUESTS_SHARE = 0.9
"""Of reward.timeout_s that requests may take; the rest is for their bodies."""
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def check_judges(config: Config) -> None:
    """Refuse settings of `code` and `http` that cannot work. Raises UserError."""
    names = {name for text in reward_keys(config) for _, name in sum_terms(text)}
    reward = config.reward
    if "code" in names and reward.code.test_timeout_s > reward.timeout_s / 2:
        raise UserError(
            f"reward.code.test_timeout_s={reward.code.test_timeout_s:g} is above half of reward.timeout_s={reward.timeout_s:g}, "
            "which limits all tests of a response; raise reward.timeout_s"
        )
    if "http" in names:
        _check_url(config)
        _check_time(config)


def _check_url(config: Config) -> None:
    http = config.reward.http
    if http.url is None:
        raise UserError("the reward http needs reward.http.url, the address of the judge")
    if has_password(http.url):
        raise UserError(
            "reward.http.url has a user or password, and settings are stored with the run; use reward.http.token_variable"
        )
    try:
        parts = urlsplit(http.url)
        usable = (
            parts.scheme in ("http", "https")
            and not parts.query  # which may have a secret; settings are stored with the run
            and bool(parts.hostname)
            and (parts.port is None or parts.port > 0)
        )
    except ValueError:
        usable = False
    if not usable or not (http.url.isascii() and http.url.isprintable()) or " " in http.url:
        raise UserError(
            f"reward.http.url={http.url!r:.80} must be https://HOST:PORT/PATH or http://HOST:PORT/PATH, without a query"
        )
    if http.token_variable is None:
        return
    if not _VARIABLE.fullmatch(http.token_variable):
        raise UserError(
            "reward.http.token_variable must be the name of an environment variable, not the token"
        )
    if parts.scheme == "http" and parts.hostname not in LOCAL_HOSTS:
        raise UserError(
            "reward.http.token_variable with a url of http:// would send the token unencrypted; use https:// or a judge on "
            "localhost"
        )


def _check_time(config: Config) -> None:
    http, limit = config.reward.http, config.reward.timeout_s
    longest = (http.max_retries + 1) * http.timeout_s + http.backoff_s * (2.0**http.max_retries - 1)
    if longest > REQUESTS_SHARE * limit:
        raise UserError(
            f"reward.timeout_s={limit:g} is too short for reward.http: {http.max_retries + 1} requests of {http.timeout_s:g} s "
            f"and their waits may take {longest:g} s; raise it to at least {math.ceil(longest / REQUESTS_SHARE)}, or lower "
            "reward.http.timeout_s or max_retries"
        )
