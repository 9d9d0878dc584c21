"""From settings to a redis-py client: one server, the primary of a Sentinel set, or a Cluster."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import redis
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode
from redis.connection import parse_url
from redis.exceptions import RedisClusterException
from redis.retry import Retry

from .errors import ConfigError
from .settings import RedisSettings
from .texts import Text

Client = redis.Redis | redis.RedisCluster
_SHARED: Final = {"ssl", "socket", "retry", "protocol", "driver"}
"""How options begin that are the same for a Sentinel and for what it watches."""


def connect(settings: RedisSettings, timeout: float) -> Callable[[], Client]:
    """Returns what makes a client, which tries everything once. One exchange takes `timeout`
    seconds at the most. Raises ConfigError for a url that redis-py does not take."""
    common, once = _options(settings, timeout)
    url = settings.url
    if url is None:
        common |= {"host": settings.host, "port": settings.port, "db": settings.db}
        common |= {"ssl": settings.tls, "ssl_check_hostname": True}
        client = redis.Redis(**common, **once)
        return lambda: client
    try:
        nodes = [parse_url(node) for node in url.nodes]
        given = common | nodes[0] | once
        if given.get("connection_class") is redis.SSLConnection:
            given.setdefault("ssl_check_hostname", True)
        for name in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile"):
            if name in given and not Path(given[name]).is_file():
                problem = Text("there is no such file").at(name)
                raise ConfigError(problem.at("[redis] url"))
        return _of_kind(url.kind, url.service, nodes, given)
    except (TypeError, ValueError, AttributeError, redis.RedisError):
        # Its words may have a value in them, and that may be a secret.
        problem = Text("redis-py does not take it: check host, port and the options after a ?")
        raise ConfigError(problem.at("[redis] url")) from None


def _options(settings: RedisSettings, timeout: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a url may say otherwise, and what it may not."""
    common: dict[str, Any] = {
        "username": settings.username or None,
        "password": settings.password or None,
        "protocol": 2,
    }
    once: dict[str, Any] = {
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        "retry": Retry(NoBackoff(), 0),
        "decode_responses": False,
        # Some proxies hang up on CLIENT SETINFO; redis-py 7 sends it unless both are empty.
        "driver_info": redis.DriverInfo(name="", lib_version=""),
    }
    return common, once


def _of_kind(
    kind: str, service: str, nodes: list[dict[str, Any]], given: dict[str, Any]
) -> Callable[[], Client]:
    if not kind:
        pool = redis.ConnectionPool(**given)
        pool.make_connection()  # it does not connect, but looks at its arguments
        client = redis.Redis.from_pool(pool)
        return lambda: client
    port = 26379 if kind == "sentinel" else 6379
    hosts = [(node.get("host", "localhost"), node.get("port", port)) for node in nodes]
    for name in ("host", "port"):
        given.pop(name, None)
    if given.pop("connection_class", None):
        given["ssl"] = True
    if kind == "cluster":
        return partial(_cluster, hosts, given.pop("retry"), given)
    theirs = {name: value for name, value in given.items() if name.split("_")[0] in _SHARED}
    for name in ("username", "password"):
        theirs[name] = given.pop(f"sentinel_{name}", None)
    primary = redis.Sentinel(hosts, sentinel_kwargs=theirs, **given).master_for(service)
    primary.connection_pool.make_connection()
    return lambda: primary


def _cluster(
    hosts: list[tuple[str, int]], once: Retry, given: dict[str, Any]
) -> redis.RedisCluster:
    cluster = redis.RedisCluster(
        startup_nodes=[ClusterNode(*host) for host in hosts],
        dynamic_startup_nodes=False,  # or those that moved are asked for ever
        require_full_coverage=False,
        # It asks a node at random as soon as it is made; of those, one may hang.
        retry=Retry(NoBackoff(), len(hosts)),
        **given,
    )
    cluster.set_retry(once)
    return cluster


def explain(error: Exception) -> tuple[bool, str]:
    """Tells whether Redis was reached and refused, and the words for it, without the arguments of
    the failed command; "" where a reply makes no sense, since redis-py repeats that."""
    shown = redis.ConnectionError | redis.TimeoutError | redis.ResponseError
    shown |= RedisClusterException
    if isinstance(error, redis.InvalidResponse) or not isinstance(error, shown):
        return False, ""
    words = str(error)[:1000].rpartition("caused error: ")[2].partition(", with args")[0]
    return isinstance(error, redis.ResponseError), words.partition(" : <")[0].rstrip(".")
