"""Redis as companies have it, on this machine: Sentinel, Cluster, TLS, and twemproxy before it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
from harness import PATIENCE, RedisServer, eventually, free_port

SLOTS = 16384


class Sentinels:
    """A primary, two replicas, and three sentinels that watch them."""

    service = "wechat"

    def __init__(self, binary: str = "") -> None:
        self._stack = ExitStack()
        with ExitStack() as undo:
            undo.callback(self.stop)
            self.nodes = [
                self._started(RedisServer("--repl-diskless-sync-delay", "0", binary=binary))
                for _ in range(3)
            ]
            for replica in self.nodes[1:]:
                replica.run("REPLICAOF", "127.0.0.1", self.nodes[0].port)
            for replica in self.nodes[1:]:
                eventually("the replica is linked", lambda at=replica: is_linked(at))  # type: ignore[misc]
            # They would find out each other within some seconds; told, they know at once.
            ids = {free_port(): f"{number}" * 40 for number in range(1, 4)}
            self.sentinels = [
                self._started(
                    RedisServer(
                        "--sentinel",
                        binary=binary,
                        port=port,
                        config=self._config(port, ids),
                    )
                )
                for port in ids
            ]
            self.wait_until_well()
            undo.pop_all()

    def _started(self, server: RedisServer) -> RedisServer:
        self._stack.callback(server.stop)
        return server

    def _config(self, own_port: int, ids: dict[int, str]) -> list[str]:
        name, (primary, *replicas) = self.service, self.nodes
        return [
            f"sentinel myid {ids[own_port]}",
            f"sentinel monitor {name} 127.0.0.1 {primary.port} 2",
            f"sentinel down-after-milliseconds {name} 1500",
            f"sentinel failover-timeout {name} 2000",
            *(f"sentinel known-replica {name} 127.0.0.1 {node.port}" for node in replicas),
            *(
                f"sentinel known-sentinel {name} 127.0.0.1 {port} {its_id}"
                for port, its_id in ids.items()
                if port != own_port
            ),
        ]

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
    def ini(self) -> list[str]:
        return ["[redis]", f"url = {self.url}"]

    @property
    def primary(self) -> RedisServer:
        """The one that the sentinels name, those that answer."""
        for sentinel in self.sentinels:
            with suppress(redis.RedisError), sentinel.client(timeout=0.5) as client:
                _, port = client.sentinel_get_master_addr_by_name(self.service)
                return next(node for node in self.nodes if node.port == port)
        raise AssertionError("no sentinel answers")

    def run(self, *command: str | float) -> Any:
        """On the primary."""
        return self.primary.run(*command)

    def wait_for_promotion(self, old: RedisServer) -> RedisServer:
        """The new primary, once every sentinel knows it and it takes writes."""
        return eventually("a replica is promoted", lambda: self._promoted(old))

    def _promoted(self, old: RedisServer) -> RedisServer | None:
        ports = set()
        for sentinel in self.sentinels:
            with sentinel.client() as client:
                ports.add(client.sentinel_get_master_addr_by_name(self.service)[1])
        new = next(node for node in self.nodes if node.port in ports)
        settled = len(ports) == 1 and new is not old and new.run("ROLE")[0] == "master"
        return new if settled else None

    def kill_primary(self) -> RedisServer:
        """The one killed, at once; the promotion takes some seconds."""
        old = self.primary
        old.kill()
        return old

    def bring_back(self, old: RedisServer) -> None:
        """As a replica of the primary, and waits until it is one, and the sentinels know."""
        old.options = (
            *("--repl-diskless-sync-delay", "0"),
            *("--replicaof", "127.0.0.1", str(self.primary.port)),
        )
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
    """A Redis Cluster of three masters without replicas."""

    def __init__(self, binary: str = "") -> None:
        self._stack = ExitStack()
        with ExitStack() as undo:
            undo.callback(self.stop)
            self.masters = [self._started(binary) for _ in range(3)]
            for number, master in enumerate(self.masters):
                master.run("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
                slots = range(number * SLOTS // 3, (number + 1) * SLOTS // 3)
                master.run("CLUSTER", "ADDSLOTS", *slots)
                if number:
                    master.run("CLUSTER", "MEET", "127.0.0.1", self.masters[0].port)
            eventually("the cluster is well", self._is_well)
            undo.pop_all()

    def _started(self, binary: str) -> RedisServer:
        options = {
            "--cluster-enabled": "yes",
            "--cluster-config-file": "nodes.conf",
            "--cluster-require-full-coverage": "no",
        }
        server = RedisServer(*sum(options.items(), ()), binary=binary)
        self._stack.callback(server.stop)
        return server

    def _is_well(self) -> bool:
        """Whether all three know all of it."""
        for master in self.masters:
            about = master.run("CLUSTER INFO")
            if about["cluster_state"] != "ok" or about["cluster_slots_ok"] != str(SLOTS):
                return False
            if about["cluster_known_nodes"] != "3":
                return False
        return True

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{master.port}" for master in self.masters)
        return f"redis+cluster://{hosts}"

    @property
    def ini(self) -> list[str]:
        return ["[redis]", f"url = {self.url}"]

    def master_of(self, key: str) -> RedisServer:
        slot = self.masters[0].run("CLUSTER", "KEYSLOT", key)
        return next(
            master for number, master in enumerate(self.masters) if slot < (number + 1) * SLOTS // 3
        )

    def run(self, command: str, key: str, *arguments: str | float) -> Any:
        """On the master of the key."""
        return self.master_of(key).run(command, key, *arguments)

    def flush(self) -> None:
        for master in self.masters:
            master.run("FLUSHALL")

    def stop(self) -> None:
        self._stack.close()


class Endpoint:
    """A port that is always there, and hands on to whatever node is behind it just now."""

    def __init__(self, target: int) -> None:
        self.target = target
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listening.getsockname()[1])
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listening.accept()
                threading.Thread(target=self._hand_on, args=(connection,), daemon=True).start()

    def _hand_on(self, connection: socket.socket) -> None:
        def copy(source: socket.socket, to: socket.socket) -> None:
            with suppress(OSError):
                for received in iter(lambda: source.recv(65536), b""):
                    to.sendall(received)
                to.shutdown(socket.SHUT_WR)

        with (
            connection,
            suppress(OSError),
            socket.create_connection(("127.0.0.1", self.target)) as onward,
        ):
            back = threading.Thread(target=copy, args=(onward, connection))
            back.start()
            copy(connection, onward)
            back.join(PATIENCE)

    def stop(self) -> None:
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join(PATIENCE)


@dataclass(frozen=True)
class Certificates:
    """A CA, and what it signed for a server on this machine and for a client of that."""

    folder: Path

    def make(self) -> Certificates:
        usage = "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign\n"
        self._make("ca", usage, signer=[])
        by_ca = ["-CA", str(self.path("ca.pem")), "-CAkey", str(self.path("ca.key"))]
        by_ca.append("-CAcreateserial")
        leaf = "keyUsage=critical,digitalSignature\nauthorityKeyIdentifier=keyid\n"
        names = "subjectAltName=DNS:localhost,IP:127.0.0.1\nextendedKeyUsage=serverAuth\n"
        self._make("server", leaf + names, by_ca)
        self._make("stranger", leaf + "subjectAltName=DNS:other.example\n", by_ca)
        self._make("client", leaf + "extendedKeyUsage=clientAuth\n", by_ca)
        return self

    def _make(self, name: str, extensions: str, signer: Sequence[str]) -> None:
        key, request, certificate = (self.path(f"{name}.{end}") for end in ("key", "csr", "pem"))
        self.path(f"{name}.ext").write_text("subjectKeyIdentifier=hash\n" + extensions)
        openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", key)
        openssl("req", "-new", "-key", key, "-subj", f"/CN=the test's {name}", "-out", request)
        signed_by = signer or ["-signkey", str(key)]
        extended = ("-extfile", self.path(f"{name}.ext"))
        openssl("x509", "-req", "-in", request, *signed_by, *extended, "-out", certificate)

    def path(self, name: str) -> Path:
        return self.folder / name

    @property
    def query(self) -> str:
        """What a url says of them: the CA, and the client's certificate and key."""
        names = {
            "ssl_ca_certs": "ca.pem",
            "ssl_certfile": "client.pem",
            "ssl_keyfile": "client.key",
        }
        return "&".join(f"{option}={self.path(name)}" for option, name in names.items())

    def options(self, port: int, name: str = "server", clients: str = "yes") -> list[str]:
        """Of a redis-server that shows the certificate of that name, for clients that have one
        themselves, or for all where that is "no"."""
        options: dict[str, Any] = {
            "--tls-port": port,
            "--tls-ca-cert-file": self.path("ca.pem"),
            "--tls-cert-file": self.path(f"{name}.pem"),
            "--tls-key-file": self.path(f"{name}.key"),
            "--tls-auth-clients": clients,
        }
        return [str(text) for option in options.items() for text in option]


def openssl(*arguments: str | Path) -> None:
    command = ["openssl", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class Twemproxy:
    """nutcracker, in front of one redis-server or of several that share the keys among them."""

    def __init__(self, backends: Sequence[RedisServer]) -> None:
        self.backends = backends
        self.port = free_port()
        self._folder = tempfile.TemporaryDirectory(prefix="nutcracker-")
        folder = Path(self._folder.name)
        lines = [
            "shared:",
            f"  listen: 127.0.0.1:{self.port}",
            "  redis: true",
            "  hash: fnv1a_64",
            "  distribution: modula",
            "  timeout: 1000",
            "  servers:",
            *(f"   - 127.0.0.1:{backend.port}:1" for backend in backends),
        ]
        (folder / "nutcracker.yml").write_text("\n".join([*lines, ""]))
        command = [twemproxy_binary(), "-c", "nutcracker.yml", "-o", "log", "-p", "pid"]
        command += ["-a", "127.0.0.1", "-s", str(free_port())]
        self._process = subprocess.Popen(command, cwd=folder)
        try:
            eventually("nutcracker answers", self._answers)
        except BaseException:
            self.stop()
            raise

    def _answers(self) -> bool:
        log = Path(self._folder.name) / "log"
        assert self._process.poll() is None, log.read_text()
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), PATIENCE) as to:
            to.sendall(b"*1\r\n$4\r\nPING\r\n")
            return to.recv(100) == b"+PONG\r\n"
        return False

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    @property
    def ini(self) -> list[str]:
        return ["[redis]", f"url = {self.url}"]

    def stop(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        self._folder.cleanup()


def twemproxy_binary() -> str:
    path = os.pathsep.join([*os.get_exec_path(), "/usr/sbin"])
    found = shutil.which("nutcracker", path=path)
    if not found:
        raise FileNotFoundError(
            "no nutcracker: install it, for example by apt-get install nutcracker"
        )
    return found
