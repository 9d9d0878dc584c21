"""Redis as companies have it, on this machine: Sentinel, Cluster, TLS, and twemproxy before it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import PATIENCE, RedisServer, eventually, free_port, unavailable

SLOTS = 16384


class Sentinels:
    """A primary, two replicas, and three sentinels that watch them."""

    service = "wechat"

    def __init__(self) -> None:
        self._stack = ExitStack()
        with ExitStack() as undo:
            undo.callback(self.stop)
            self.nodes = [self._started("--repl-diskless-sync-delay", "0") for _ in range(3)]
            for replica in self.nodes[1:]:
                replica.run("REPLICAOF", "127.0.0.1", self.nodes[0].port)
            for replica in self.nodes[1:]:
                eventually("the replica is linked", lambda at=replica: is_linked(at))  # type: ignore[misc]
            config = f"""
                sentinel monitor {self.service} 127.0.0.1 {self.nodes[0].port} 2
                sentinel down-after-milliseconds {self.service} 1500
                sentinel failover-timeout {self.service} 2000
            """
            self.sentinels = [self._started("--sentinel", config=config) for _ in range(3)]
            self.wait_until_well()
            undo.pop_all()

    def _started(self, *options: str, config: str = "") -> RedisServer:
        server = RedisServer(*options, config=config)
        self._stack.callback(server.stop)
        return server

    def wait_until_well(self) -> None:
        eventually("the sentinels agree that all is well", self._agree)
        eventually("what is written is replicated", self._replicates)

    def _replicates(self) -> bool:
        """Whether both replicas follow; one that is linked may do so only a second later."""
        with self.primary.client() as client:
            client.set("replicated", "?")
            done = client.wait(2, 1000) == 2
            client.delete("replicated")
        return bool(done)

    def _agree(self) -> bool:
        for sentinel in self.sentinels:
            with sentinel.client() as client:
                about = client.sentinel_master(self.service)
                replicas = client.sentinel_slaves(self.service)
            if about["num-other-sentinels"] != 2 or about["flags"] != "master":
                return False
            # How the replicas' links are, they ask every 10 s only, and sooner once it matters.
            if [replica["flags"] for replica in replicas] != ["slave", "slave"]:
                return False
        return True

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://{hosts}/{self.service}"

    @property
    def primary(self) -> RedisServer:
        return next(node for node in self.nodes if node.port == self._named_by(self.sentinels[0]))

    def _named_by(self, sentinel: RedisServer) -> int:
        with sentinel.client() as client:
            return int(client.sentinel_get_master_addr_by_name(self.service)[1])

    def wait_for_promotion(self, old: RedisServer) -> RedisServer:
        """The new primary, once every sentinel knows it and it takes writes."""
        return eventually("a replica is promoted", lambda: self._promoted(old))

    def _promoted(self, old: RedisServer) -> RedisServer | None:
        ports = {self._named_by(sentinel) for sentinel in self.sentinels}
        new = next(node for node in self.nodes if node.port in ports)
        settled = len(ports) == 1 and new is not old and new.run("ROLE")[0] == "master"
        return new if settled else None

    def bring_back(self, old: RedisServer) -> None:
        """As a replica of the primary, and waits until it is one, and the sentinels know."""
        old.options += ("--replicaof", "127.0.0.1", str(self.primary.port))
        old.start()
        self._wait_for_replica(old)

    def demote(self, old: RedisServer) -> None:
        """What the sentinels do with a primary that comes back, some 10 s after that."""
        old.run("REPLICAOF", "127.0.0.1", self.primary.port)
        old.run("CLIENT", "KILL", "TYPE", "normal")
        self._wait_for_replica(old)

    def _wait_for_replica(self, old: RedisServer) -> None:
        eventually("the old primary is a replica", lambda: is_linked(old))
        self.wait_until_well()

    def stop(self) -> None:
        self._stack.close()


def is_linked(replica: RedisServer) -> bool:
    """Whether it is a replica that has all its primary has."""
    return bool(replica.run("ROLE")[3:4] == ["connected"])


class ClusterOfThree:
    """A Redis Cluster of three masters without replicas, the last of them on the port."""

    def __init__(self, port: int = 0) -> None:
        self._stack = ExitStack()
        options = ["--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf"]
        options += ["--cluster-require-full-coverage", "no"]
        with ExitStack() as undo:
            undo.callback(self.stop)
            self.masters: list[RedisServer] = []
            for number in range(3):
                master = RedisServer(*options, port=port if number == 2 else 0)
                self._stack.callback(master.stop)
                self.masters.append(master)
                master.run("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
                slots = range(number * SLOTS // 3, (number + 1) * SLOTS // 3)
                master.run("CLUSTER", "ADDSLOTS", *slots)
                if number:
                    master.run("CLUSTER", "MEET", "127.0.0.1", self.masters[0].port)
            eventually("the cluster is well", self._is_well)
            undo.pop_all()

    def _is_well(self) -> bool:
        """Whether all three know all of it."""
        well = {"cluster_state": "ok", "cluster_slots_ok": str(SLOTS), "cluster_known_nodes": "3"}
        return all(well.items() <= one.run("CLUSTER INFO").items() for one in self.masters)

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{master.port}" for master in self.masters)
        return f"redis+cluster://{hosts}"

    def master_of(self, key: str) -> RedisServer:
        slot = int(self.masters[0].run("CLUSTER", "KEYSLOT", key))
        return self.masters[sum(slot >= end * SLOTS // 3 for end in (1, 2))]

    def stop(self) -> None:
        self._stack.close()


@dataclass(frozen=True)
class Certificates:
    """A CA, and what it signed for a server on this machine and for a client of that."""

    folder: Path

    def make(self) -> Certificates:
        usage = "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign\n"
        self._make("ca", usage, signer=[])
        ca, key = str(self.path("ca.pem")), str(self.path("ca.key"))
        by_ca = ["-CA", ca, "-CAkey", key, "-CAcreateserial"]
        leaf = "keyUsage=critical,digitalSignature\nauthorityKeyIdentifier=keyid\n"
        names = "subjectAltName=DNS:localhost,IP:127.0.0.1\nextendedKeyUsage=serverAuth\n"
        self._make("server", leaf + names, by_ca)
        self._make("stranger", leaf + "subjectAltName=DNS:other.example\n", by_ca)
        self._make("client", leaf + "extendedKeyUsage=clientAuth\n", by_ca)
        return self

    def _make(self, name: str, extensions: str, signer: Sequence[str]) -> None:
        key, request, certificate = (self.path(f"{name}.{end}") for end in ("key", "csr", "pem"))
        self.path(f"{name}.ext").write_text("subjectKeyIdentifier=hash\n" + extensions)
        signed = *(signer or ["-signkey", str(key)]), "-extfile", self.path(f"{name}.ext")
        for command in (
            ("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", key),
            ("req", "-new", "-key", key, "-subj", f"/CN=the test's {name}", "-out", request),
            ("x509", "-req", "-in", request, *signed, "-out", certificate),
        ):
            openssl = ["openssl", *map(str, command)]
            done = subprocess.run(openssl, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr

    def path(self, name: str) -> Path:
        return self.folder / name

    @property
    def query(self) -> str:
        """What a url says of them: the CA, and the client's certificate and key."""
        names = {"ca_certs": "ca.pem", "certfile": "client.pem", "keyfile": "client.key"}
        return "&".join(f"ssl_{option}={self.path(name)}" for option, name in names.items())

    def options(self, port: int, name: str = "server", clients: str = "yes") -> list[str]:
        """Of a redis-server that shows the certificate of that name, for clients that have one
        themselves, or for all where that is "no"."""
        options: list[Any] = ["--tls-port", port, "--tls-ca-cert-file", self.path("ca.pem")]
        options += ["--tls-cert-file", self.path(f"{name}.pem")]
        options += ["--tls-key-file", self.path(f"{name}.key"), "--tls-auth-clients", clients]
        return [str(option) for option in options]


class Twemproxy:
    """nutcracker, in front of one redis-server or of several that share the keys among them."""

    def __init__(self, backends: Sequence[RedisServer]) -> None:
        self.port = free_port()
        self._folder = tempfile.TemporaryDirectory(prefix="nutcracker-")
        servers = "".join(f"\n   - 127.0.0.1:{backend.port}:1" for backend in backends)
        (Path(self._folder.name) / "nutcracker.yml").write_text(
            f"shared:\n  listen: 127.0.0.1:{self.port}\n  redis: true\n  timeout: 1000\n"
            f"  hash: fnv1a_64\n  distribution: modula\n  servers:{servers}\n"
        )
        path = os.pathsep.join([*os.get_exec_path(), "/usr/sbin"])
        binary = shutil.which("nutcracker", path=path)
        if not binary:
            unavailable("no nutcracker: install it, as by apt-get install nutcracker")
        command = [binary, "-c", "nutcracker.yml", "-o", "log", "-p", "pid"]
        command += ["-a", "127.0.0.1", "-s", str(free_port())]
        self._process = subprocess.Popen(command, cwd=self._folder.name)
        try:
            eventually("nutcracker answers", self._answers)
        except BaseException:
            self.stop()
            raise

    def _answers(self) -> bool:
        with socket.create_connection(("127.0.0.1", self.port), PATIENCE) as connection:
            connection.sendall(b"*1\r\n$4\r\nPING\r\n")
            return connection.recv(100) == b"+PONG\r\n"

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()
