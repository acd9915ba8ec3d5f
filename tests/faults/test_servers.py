"""Parameter servers of somebody else's, in odd settings: waited for, shared, or refused with a sentence."""

import hashlib
import logging
import re
import socket
import ssl
import subprocess
import threading
import time

import h5py
import msgspec
import pytest
import redis

from snn.backends.local.services import Services
from snn.backends.valkey import store as store_room
from snn.backends.valkey.store import connect
from snn.cloud.arrays import key
from snn.cloud.messages import Message, Upload
from snn.handlers.upload import run_id
from snn.local import training
from snn.local.cloud import LocalCloud
from snn.local.server import find_server_program


def bytes_of(path) -> dict[str, bytes]:
    with h5py.File(path) as file:
        return {name: file[name][()].tobytes() for name in file}


class Servers:
    "Parameter servers that are not the training's own."

    def __init__(self, folder, until):
        self.folder, self.until, self.started = folder, until, []

    def start(self, *settings: str, password: str = "") -> str:
        "Start one; returns its address."
        path = f"{self.folder}/{len(self.started)}.sock"
        secret = ("--requirepass", password) if password else ()
        command = [find_server_program(), "--port", "0", "--unixsocket", path, "--save", ""]
        command += ["--dir", str(self.folder), *secret, *settings]
        self.started.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
        url = f"unix://:{password}@{path}" if password else f"unix://{path}"

        def is_up() -> bool:
            try:
                return redis.Redis.from_url(url).ping()
            except redis.ConnectionError:
                return False

        self.until(is_up, "the server answers")
        return url

    def close(self) -> None:
        for server in self.started:
            server.kill()
        for server in self.started:
            server.wait()


@pytest.fixture
def outside(tmp_path, until, monkeypatch):
    "Starts a parameter server that is not the training's own, and sets its address; returns it."
    servers = Servers(tmp_path, until)

    def start(*settings: str, password: str = "") -> str:
        url = servers.start(*settings, password=password)
        monkeypatch.setenv("SNN_REDIS_URL", url)
        return url

    yield start
    servers.close()


@pytest.fixture(scope="module")
def short_run(parameters):
    "Parameters of a run that takes a second or two."
    return parameters(
        (5, 3, 1),
        epochs=40,
        batch_size=84,
        granularity="layer",
        checkpoint_every=4,
        stall_after=1,
        learning_rate=0.05,
    )


@pytest.fixture(scope="module")
def shared(tmp_path_factory, until, short_run, small_data, start_run, finished):
    "A cloud on a server of somebody else's, that server's address and folder, and the model of an undisturbed run."
    folder = tmp_path_factory.mktemp("shared")
    servers = Servers(folder, until)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SNN_REDIS_URL", url := servers.start())
        with LocalCloud() as cloud:
            run = start_run(cloud, "undisturbed", short_run, small_data)
            finished(cloud, run)
            yield cloud, url, folder, cloud.bucket.get(f"training_results/{run}/params.h5")
    servers.close()


class Trouble:
    "Makes a server refuse, and stops it again."

    def __init__(self, url: str, folder):
        self.admin, self.folder = redis.Redis.from_url(url), folder

    def readonly(self, on: bool) -> None:
        self.admin.replicaof(*(("127.0.0.1", "1") if on else ("NO", "ONE")))

    def oom(self, on: bool) -> None:
        self.admin.config_set("maxmemory", 1 if on else 0)

    def misconf(self, on: bool) -> None:
        if not on:
            self.admin.config_set("save", "")
            return
        (self.folder / "dump.rdb").mkdir(exist_ok=True)
        self.admin.config_set("save", "3600 1")
        self.admin.bgsave()
        deadline = time.monotonic() + 20
        while (
            self.admin.info("persistence")["rdb_last_bgsave_status"] == "ok"
            and time.monotonic() < deadline
        ):
            time.sleep(0.01)

    def clients(self, on: bool) -> None:
        self.admin.config_set("maxclients", 1 if on else 10000)
        if on:
            self.admin.client_kill_filter(_type="normal", skipme=True)


# The moments of a run's life, as messages that the server is given: function, direction, epoch.
LIFE = {
    "start": ("TrainerLambda", "start", 0),
    "in the middle of an epoch": ("NeuronLambda", "backward", 5),
    "end of an epoch": ("LaunchLambda", "next", 8),
    "checkpoint": ("LaunchLambda", "next", 15),
    "end of the run": ("LaunchLambda", "next", 39),
}


def moments(url: str, run: str):
    "The moments of a run, as they come; none is missed, as the server's account of them is kept."
    waiting = {
        moment: re.compile(
            rf'"function":"{function}","direction":"{direction}","run":"{run}","epoch":{epoch}\b'
        )
        for moment, (function, direction, epoch) in LIFE.items()
    }
    with redis.Redis.from_url(url).monitor() as monitor:
        yield "ready"
        while waiting:
            said = monitor.next_command()["command"].replace("\\", "")
            for moment in [m for m, looks in waiting.items() if looks.search(said)]:
                del waiting[moment]
                yield moment


@pytest.mark.parametrize("seconds", [0.1, 2, 20])
@pytest.mark.parametrize("kind", ["readonly", "oom", "misconf"])
def test_a_server_that_refuses_at_any_moment_of_a_run_changes_no_byte(
    kind, seconds, shared, small_data, short_run, start_run, finished, all_faults
):
    if seconds > 2 and not all_faults:
        pytest.skip("20 s for each kind with --faults")
    cloud, url, folder, undisturbed = shared
    trouble, name = Trouble(url, folder), f"{kind}-{seconds}"
    upload = Upload(cloud.bucket_name, f"training_input/{name}/datasets.h5", etag(small_data))
    life = moments(url, run := run_id(upload, short_run))
    assert next(life) == "ready" and start_run(cloud, name, short_run, small_data) == run
    disturbed = []
    for moment in life:
        getattr(trouble, kind)(True)
        time.sleep(seconds)
        getattr(trouble, kind)(False)
        disturbed.append(moment)
    finished(cloud, run)
    assert set(disturbed) == set(LIFE) and not cloud.failed
    assert cloud.bucket.get(f"training_results/{run}/params.h5") == undisturbed


def etag(path) -> str:
    "The ETag of a file that is uploaded whole."
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("seconds", [0.1, 2, 20])
def test_a_server_with_too_many_clients_for_a_while_changes_no_byte(
    seconds, shared, small_data, short_run, start_run, finished, all_faults, until
):
    if seconds > 0.1 and not all_faults:
        pytest.skip("20 s for each kind with --faults")  # takes 50 s for 2
    cloud, url, folder, undisturbed = shared
    trouble = Trouble(url, folder)
    run = start_run(cloud, f"clients-{seconds}", short_run, small_data)
    disturbed = []
    for epoch in (-1, 3, 11, 37):  # the start, a checkpoint, an epoch, near the end
        until(lambda: cloud.services.runs.status(run).epoch >= epoch, f"epoch {epoch} is done")
        disturbed.append(cloud.services.runs.status(run).epoch)
        trouble.clients(True)
        time.sleep(seconds)
        trouble.clients(False)
    finished(cloud, run)
    assert disturbed[1] < 39 and not cloud.failed
    assert cloud.bucket.get(f"training_results/{run}/params.h5") == undisturbed


def test_a_server_that_refuses_too_long_ends_the_training_with_what_it_says_and_resume_goes_on(
    shared, outside, tmp_path, small_data, short_run, monkeypatch
):
    trouble = Trouble(outside(), tmp_path)
    monkeypatch.setattr(store_room, "PATIENCE", 0.5)

    def report(progress) -> None:
        if progress.status.epoch > 5:
            trouble.readonly(True)

    with pytest.raises(RuntimeError, match="has refused for 0.5 s; it says: READONLY"):
        training.train(short_run, small_data, tmp_path / "cut", report, workers=1)
    trouble.readonly(False)
    training.resume(tmp_path / "cut", workers=1)
    assert (tmp_path / "cut" / "params.h5").read_bytes() == shared[-1]


@pytest.mark.parametrize(
    "reply",
    [
        "LOADING Valkey is loading the dataset in memory",
        "READONLY You can't write against a read only replica.",
        "OOM command not allowed when used memory > 'maxmemory'.",
        "MISCONF the disk is full",
        "ERR max number of clients reached",
    ],
)
def test_each_refusal_is_waited_for_and_said_in_its_words(reply, caplog):
    words, before = reply.encode(), time.monotonic()
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        "Refuse for two seconds, then answer whatever is asked."
        while True:
            try:
                talk, _ = server.accept()
            except OSError:
                return
            with talk:
                while asked := talk.recv(4096):
                    for command in asked.split(b"*")[1:]:
                        refuses = b"PING" in command and time.monotonic() - before < 2
                        answer = (
                            b"%1\r\n+proto\r\n:3\r\n" if b"HELLO" in command else b"+PONG\r\n"
                        )
                        talk.sendall(b"-" + words + b"\r\n" if refuses else answer)

    threading.Thread(target=serve, daemon=True).start()
    client = connect(f"redis://127.0.0.1:{server.getsockname()[1]}")
    client.set_retry(redis.retry.Retry(redis.backoff.NoBackoff(), 0))
    with caplog.at_level(logging.WARNING, "snn"):
        assert client.ping()
    server.close()
    own = threading.get_ident()  # another test's cloud may have lost its server
    said = [record.getMessage() for record in caplog.records if record.thread == own]
    assert (
        len(said) == 2 and reply.removeprefix("ERR ") in said[0] and "answers again" in said[1]
    )


def test_a_refused_large_value_is_not_counted_by_its_barrier(outside):
    url = outside()
    admin, services = redis.Redis.from_url(url), Services({"SNN_REDIS_URL": url})
    store = services.store
    message, following = (
        Message("NeuronLambda", "network", "r", epoch=0, batch=0),
        Message("LaunchLambda", "next", "r", epoch=0),
    )

    class Flaky:
        "The server's memory is full when the large value comes, and not any more when the script does."

        def __init__(self, connection):
            self.connection = connection

        def __getattr__(self, name):
            return getattr(self.connection, name)

        def send_packed_command(self, command):
            admin.config_set("maxmemory", 1)
            cut = next(
                (i for i, part in enumerate(command) if b"EVALSHA" in bytes(part)),
                len(command),
            )
            self.connection.send_packed_command(command[:cut])
            time.sleep(0.05)
            admin.config_set("maxmemory", 0)
            self.connection.send_packed_command(command[cut:])
            store.connection = self.connection  # once

    store.connection = Flaky(store.client.connection_pool.get_connection())
    store.put(message, {"w1/0": b"x" * 200_000})
    joined = store.join(message, 1, following, 0.1)
    assert joined.members == 1 and store.client.hget(key("r", 0, 0), "w1/0") == b"x" * 200_000


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (
            ("--maxmemory-policy", "allkeys-lru"),
            "maxmemory-policy is allkeys-lru, and must be noeviction",
        ),
        (("--maxmemory-policy", "volatile-ttl"), "maxmemory-policy is volatile-ttl"),
        (("--cluster-enabled", "yes"), "is in cluster mode"),
    ],
)
def test_a_server_that_no_run_can_be_trusted_to_is_refused_at_the_start(
    settings, sentence, outside, snn, small_data, tmp_path
):
    outside(*settings)
    code, out, err = snn("train", "--data", small_data, "--out", tmp_path / "out", "--quiet")
    assert code == 2 and sentence in err and len(err.splitlines()) == 1
    assert not list((tmp_path / "out").rglob("*"))


@pytest.mark.parametrize(
    "rule", [("-evalsha",), ("-@write",), ("resetkeys", "~mine:*")], ids=" ".join
)
def test_a_user_who_may_not_do_what_a_run_needs_is_told_so(
    rule, outside, snn, small_data, monkeypatch, tmp_path
):
    url = outside()
    client = redis.Redis.from_url(url)
    client.execute_command(
        "ACL", "SETUSER", "cat", "on", ">hidden", "~*", "&*", "+@all", *rule
    )
    monkeypatch.setenv("SNN_REDIS_URL", url.replace("unix://", "unix://cat:hidden@"))
    code, out, err = snn("train", "--data", small_data, "--out", tmp_path / "out", "--quiet")
    assert code == 2 and len(err.splitlines()) == 1 and "hidden" not in out + err
    assert "does not allow this user what a run needs" in err


def test_a_certificate_that_nobody_has_signed_is_named(snn, small_data, monkeypatch, tmp_path):
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
        + ["-keyout", tmp_path / "key.pem", "-out", tmp_path / "certificate.pem"],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate.pem", tmp_path / "key.pem")
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                context.wrap_socket(server.accept()[0], server_side=True).close()
            except ssl.SSLError:
                continue
            except OSError:
                return

    threading.Thread(target=serve, daemon=True).start()
    port = server.getsockname()[1]
    monkeypatch.setenv("SNN_REDIS_URL", f"rediss://cat:hidden@localhost:{port}")
    code, out, err = snn("train", "--data", small_data, "--out", tmp_path / "out", "--quiet")
    server.close()
    assert code == 2 and len(err.splitlines()) == 1 and "hidden" not in out + err
    assert (
        f"the certificate of the parameter server at rediss://localhost:{port} is not" in err
    )


@pytest.mark.parametrize(
    "command",
    [("train", "--quiet"), ("local",), ("runs",), ("status", "x"), ("stop", "x")],
    ids=" ".join,
)
def test_a_wrong_password_is_said_and_not_shown(command, outside, snn, monkeypatch, root):
    url = outside(password="s3cret")
    monkeypatch.setenv("SNN_REDIS_URL", url.replace("s3cret", "wrongPW"))
    monkeypatch.chdir(root)
    code, out, err = snn(*command)
    assert code == 2 and "refuses the user or" in err and len(err.splitlines()) == 1
    assert "wrongPW" not in out + err


def test_a_server_that_is_not_there_is_named_without_its_password(
    snn, monkeypatch, small_data, tmp_path
):
    monkeypatch.setenv("SNN_REDIS_URL", f"unix://:hidden@{tmp_path}/nobody.sock")
    code, out, err = snn("train", "--data", small_data, "--out", tmp_path / "out", "--quiet")
    assert (
        code == 2
        and f"the server at unix://{tmp_path}/nobody.sock did not answer within 5 s" in err
        and "hidden" not in out + err
    )


def test_the_same_training_twice_at_once_and_twice_again_on_one_server_gives_the_same_bytes(
    outside, spawn, snn, small_data, short_run, tmp_path
):
    url = outside(password="s3cret")
    (tmp_path / "parameters.json").write_bytes(msgspec.json.encode(short_run))
    command = lambda number: [
        "train",
        "--data",
        small_data,
        "--parameters",
        tmp_path / "parameters.json",
        "--workers",
        1,
        "--out",
        tmp_path / str(number),
    ]
    both = [spawn(*command(number)) for number in (1, 2)]
    for one in both:
        out, err = one.communicate(timeout=300)
        assert one.returncode == 0 and "s3cret" not in out + err, err
    for number in (3, 4):
        code, out, err = snn(*command(number))
        assert code == 0 and "s3cret" not in out + err, err
    first, *others = [
        (tmp_path / str(number) / "params.h5").read_bytes() for number in (1, 2, 3, 4)
    ]
    assert all(other == first for other in others)
    left = [path for n in (1, 2, 3, 4) for path in (tmp_path / str(n)).rglob("*")]
    assert not any(b"s3cret" in path.read_bytes() for path in left if path.is_file())
    client = redis.Redis.from_url(url)
    assert [
        key for key in client.keys() if client.ttl(key) < 0
    ] == []  # nothing is left there for ever


def test_local_prints_no_password(outside, spawn, until, tmp_path):
    outside(password="s3cret")
    program = spawn("local", "--workers", 1)
    line = next(
        line for line in program.stdout if "Ctrl-C ends" in line or "SNN_REDIS_URL" in line
    )
    program.terminate()
    out, err = program.communicate(timeout=60)
    assert "s3cret" not in line + out + err and "and SNN_REDIS_URL, as it is set here" in line


def test_a_message_that_is_no_event_is_put_aside_and_the_rest_goes_on(
    small_data, short_run, until, finished
):
    with LocalCloud(1) as cloud:
        for body in ("not JSON at all", "[1, 2]", '"hello"', '{"function": 5, "run": 5}'):
            cloud.sqs.send_message(QueueUrl=cloud.inbox, MessageBody=body)
        until(
            lambda: len(cloud.services.bus.dead()) == 4 or cloud.failed,
            "all four are put aside",
        )
        cloud.services.store.client.rpush("snn:queue", b"no letter")
        until(lambda: len(cloud.services.bus.dead()) == 5 or cloud.failed, "and the fifth")
        assert not cloud.failed and all(
            letter["reason"] for letter in cloud.services.bus.dead()
        )
        name = run_id(cloud.upload(short_run, small_data), short_run)
        until(
            lambda: cloud.services.runs.status(name).state == "finished",
            "a run after that has finished",
            120,
        )
        assert cloud.workers.deaths == 0


def test_a_cloud_that_has_failed_ends_snn_local_with_its_reason(snn, monkeypatch):
    class Failing(LocalCloud):
        "Of its own: the cloud that other tests share goes on."

        def _look_after(self) -> None:
            raise OSError("no processors left")

    monkeypatch.setattr("snn.local.cloud.LocalCloud", Failing)
    code, out, err = snn("local", "--workers", "1")
    assert (
        code == 1 and err.strip() == "the cloud on this machine has failed: no processors left"
    )
