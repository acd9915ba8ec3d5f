"""Real processes, real signals: kill, divergence, stop, several runs, and secrets."""

import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import closing

import h5py
import msgspec
import pytest
import redis

from snn.backends.valkey.store import connect
from snn.handlers.upload import run_id
from snn.local import training
from snn.local.cloud import LocalCloud
from snn.local.server import parameter_server
from snn.local.worker import Workers


def bytes_of(path) -> dict[str, bytes]:
    with h5py.File(path) as file:
        return {name: file[name][()].tobytes() for name in file}


def processes_with(text: str) -> list[str]:
    found = subprocess.run(
        ["ps", "-eo", "pid,args"], capture_output=True, text=True
    ).stdout.splitlines()
    return [line for line in found if text in line and "ps -eo" not in line]


# Trains like `snn train`, but waits for ever as soon as a checkpoint has been copied, so that it can not end before it is killed.
HELD = """
import signal
from snn.cli.main import main
from snn.local import training
copy_down = training.copy_down
def held(bucket, mirror, name):
    copy_down(bucket, mirror, name)
    if list(mirror.rglob("0000*.npz")): mirror.joinpath("copied").touch(); signal.pause()
training.copy_down = held
main()
"""


@pytest.fixture
def long_run(parameters):
    "Parameters of a run with some checkpoints, none of them at its end."
    return parameters(
        (5, 3, 1),
        epochs=65,
        batch_size=32,
        granularity="layer",
        checkpoint_every=10,
        learning_rate=0.05,
    )


def model_of(cloud, name) -> dict[str, bytes]:
    return bytes_of(io.BytesIO(cloud.bucket.get(f"training_results/{name}/params.h5")))


@pytest.fixture(scope="module")
def whole(cloud, small_data, start_run, finished):
    "Trains undisturbed, once for equal parameters; returns the name of the run in the cloud that tests share."
    known = {}

    def run(parameters) -> str:
        name = f"whole-{hashlib.md5(written := msgspec.json.encode(parameters)).hexdigest()}"
        if written not in known:
            known[written] = start_run(cloud, name, parameters, small_data)
            finished(cloud, known[written])
        return known[written]

    return run


@pytest.fixture(scope="module")
def scarred():
    "A cloud for all accidents that a cloud recovers from."
    with LocalCloud() as opened:
        yield opened


def test_a_killed_process_group_leaves_nothing_and_its_run_is_taken_up_with_the_same_bytes(
    tmp_path, small_data, long_run, until, cloud, whole
):
    parameters_json = tmp_path / "parameters.json"
    parameters_json.write_bytes(msgspec.json.encode(long_run))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    program = subprocess.Popen(
        [
            sys.executable,
            "-c",
            HELD,
            "train",
            "--data",
            small_data,
            "--parameters",
            parameters_json,
            "--out",
            tmp_path / "cut",
        ],
        start_new_session=True,
        env={**os.environ, "TMPDIR": str(scratch)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until(lambda: list((tmp_path / "cut").rglob("copied")), "a checkpoint was copied")
    os.killpg(program.pid, signal.SIGKILL)
    program.wait()
    assert not (tmp_path / "cut" / "params.h5").exists()
    until(lambda: not processes_with(str(scratch)), "no process of the killed run is left")
    until(
        lambda: not list(scratch.glob("snn-*")),
        "no folder or socket of the killed run is left",
    )
    training.resume(tmp_path / "cut", workers=1)
    undisturbed = whole(long_run)
    assert bytes_of(tmp_path / "cut" / "params.h5") == model_of(cloud, undisturbed)
    one = json.loads((tmp_path / "cut" / "results.json").read_text())
    two = json.loads(cloud.bucket.get(f"training_results/{undisturbed}/results.json"))
    assert {k: v for k, v in one.items() if k.startswith("epoch")} == {
        k: v for k, v in two.items() if k.startswith("epoch")
    }


def watched(cloud, name, until):
    "Waits until a run has ended; returns its status."
    runs = cloud.services.runs

    def ended():
        try:
            return (
                runs.knows(runs.newest(name))
                and runs.status(runs.newest(name)).state != "running"
            )
        except Exception:
            return False

    until(ended, f"run {name} has ended", 90)
    return runs.status(runs.newest(name))


def test_killed_workers_and_a_killed_parameter_server_change_nothing(
    small_data, long_run, until, cloud, whole, scarred
):
    quick = msgspec.structs.replace(long_run, stall_after=1.0)
    runs = scarred.services.runs
    name = run_id(scarred.upload(quick, small_data), quick)
    until(lambda: runs.status(name).epoch > 5, "some epochs are done")
    for process in list(scarred.workers.processes.values()):
        process.kill()
    until(lambda: runs.status(name).epoch > 15, "the run goes on with new workers")
    scarred.services.store.client.shutdown(nosave=True)
    assert watched(scarred, name, until).state == "finished"
    assert model_of(scarred, name) == model_of(cloud, whole(quick))
    assert "~" in runs.newest(name)  # it was taken up again


def signalled(cloud, number: signal.Signals) -> None:
    "Send all workers a signal."
    for process in cloud.workers.processes.values():
        process.send_signal(number)


@pytest.mark.parametrize("granularity", ["neuron", "layer", "network"])
def test_workers_killed_over_and_over_at_any_moment_change_nothing(
    granularity, small_data, long_run, until, cloud, whole, scarred
):
    quick = msgspec.structs.replace(
        long_run, granularity=granularity, epochs=40, stall_after=1.0
    )
    runs, dice, killed_in = scarred.services.runs, random.Random(granularity), []

    def epoch() -> int:
        "Which epoch is under way; none before the run has begun, or after it has ended."
        status = runs.status(name) if runs.knows(name) else None
        return status.epoch + 1 if status and status.state == "running" else -1

    try:
        signalled(scarred, signal.SIGSTOP)  # nothing happens but between SIGCONT and SIGSTOP
        name = run_id(scarred.upload(quick, small_data), quick)
        for goal in (0, 8, 16, 24):
            while epoch() < goal and not (runs.knows(name) and epoch() < 0):
                signalled(scarred, signal.SIGCONT)
                time.sleep(dice.random() / 100)  # anywhere in an epoch
                signalled(scarred, signal.SIGSTOP)
            if (now := epoch()) < 0:
                break  # the run has ended
            process = scarred.workers.processes[dice.choice(scarred.workers.names)]
            process.kill()
            killed_in.append(now)
            until(lambda: process not in scarred.workers.processes.values(), "it is replaced")
    finally:
        signalled(scarred, signal.SIGCONT)
    assert len(set(killed_in)) > 1, f"killed only in epochs {killed_in}"
    status = watched(scarred, name, until)
    assert status.state == "finished", status.reason
    assert model_of(scarred, name) == model_of(cloud, whole(quick))


def test_a_learning_rate_that_is_too_large_stops_the_run_and_says_where(
    small_data, parameters, until, cloud
):
    wild = parameters(
        (5, 3, 1),
        epochs=500,
        batch_size=32,
        granularity="layer",
        checkpoint_every=1,
        learning_rate=1e155,
        hidden="leaky_relu",
    )
    name = run_id(cloud.upload(wild, small_data), wild)
    status = watched(cloud, name, until)
    stopped = json.loads(cloud.bucket.get(f"training_results/{name}/stopped.json"))
    plan = cloud.bucket.get(f"training_checkpoints/{name}/plan.json")
    assert status.state == "failed"
    for words in ("epoch ", "mini-batch ", "layer ", "a learning rate below 1e+155 may help"):
        assert words in status.reason
    if status.epoch >= 0:
        assert "the last good cost is" in status.reason
    assert stopped["state"] == "failed" and plan


def test_a_stopped_run_stops_and_can_go_on(small_data, long_run, until, cloud, whole):
    from snn.handlers import checkpoint
    from snn.handlers.ending import end_early

    runs = cloud.services.runs
    name = run_id(cloud.upload(long_run, small_data), long_run)
    until(lambda: runs.status(name).epoch > 11, "a checkpoint is there")
    cloud.services._buckets[cloud.bucket_name] = cloud.bucket
    end_early(runs.plan(name), cloud.services, "stopped", "its owner asked for it")
    until(lambda: not cloud.services.store.client.llen("snn:queue"), "no message is left")
    assert runs.status(name).state == "stopped"
    checkpoint.resume(name, cloud.bucket, cloud.services)
    assert watched(cloud, name, until).state == "finished"
    assert model_of(cloud, name) == model_of(cloud, whole(long_run))


def test_several_runs_at_once_do_not_disturb_one_another(
    small_data, parameters, start_run, finished, cloud, whole
):
    kinds = [
        parameters(
            (5, 3, 1), epochs=20, batch_size=32, granularity=g, seed=seed, learning_rate=0.05
        )
        for g in ("layer", "network")
        for seed in (0, 1)
    ]
    alone = [model_of(cloud, whole(kind)) for kind in kinds]
    names = [
        start_run(cloud, str(number), kind, small_data) for number, kind in enumerate(kinds)
    ]
    for name in names:
        finished(cloud, name)
    assert [model_of(cloud, name) for name in names] == alone


def test_a_password_is_used_and_never_shown(tmp_path, capfd, until):
    from snn.local.server import find_server_program

    path = tmp_path / "s"
    server = subprocess.Popen(
        [
            find_server_program(),
            "--port",
            "0",
            "--unixsocket",
            path,
            "--requirepass",
            "s3cret",
            "--save",
            "",
        ],
        stdout=subprocess.DEVNULL,
    )
    try:
        until(path.exists, "the server listens")
        client = connect(f"unix://:s3cret@{path}")
        assert client.ping() and "s3cret" not in repr(client) + str(client.connection_pool)
        with pytest.raises(redis.AuthenticationError) as refused:
            connect(f"unix://{path}").ping()
        assert "s3cret" not in str(refused.value)
        os.environ["SNN_REDIS_PASSWORD"] = "s3cret"
        assert connect(f"unix://{path}").ping()
    finally:
        os.environ.pop("SNN_REDIS_PASSWORD", None)
        server.terminate()
        server.wait()
    out, err = capfd.readouterr()
    assert "s3cret" not in out + err


def test_connections_are_bounded():
    with parameter_server() as server:
        client = connect(server.url)
        held = [client.connection_pool.get_connection() for _ in range(8)]
        with pytest.raises(redis.ConnectionError):
            client.ping()  # there is none left, and no ninth is opened
        ours = {connection._sock.getsockname() for connection in held}
        assert len(ours) == 8 or "" in ours  # a Unix socket has no name at our end
        for connection in held:
            client.connection_pool.release(connection)
        assert client.ping() and len(client.client_list()) == 8
    assert "SSL" in connect("rediss://127.0.0.1:1").connection_pool.connection_class.__name__


def test_workers_that_can_not_live_end_the_training_with_a_sentence(
    tmp_path, small_data, long_run, monkeypatch, capfd
):
    monkeypatch.setattr(Workers, "program", "raise OSError('no room for a worker')")
    why = "the workers die before they have done anything: OSError: no room for a worker"
    with pytest.raises(RuntimeError, match=why):
        training.train(long_run, small_data, tmp_path / "out")
    assert "Traceback" not in capfd.readouterr().err


@pytest.fixture(scope="module")
def queue():
    with parameter_server() as server:
        yield {"SNN_REDIS_URL": server.url}


def look(workers) -> None:
    "Look after workers while they live, and when they have died."
    workers.look_after()
    for process in workers.processes.values():
        process.wait()
    workers.look_after()


def test_deaths_are_counted_however_long_a_worker_lives(queue, monkeypatch):
    monkeypatch.setattr(Workers, "program", "raise SystemExit('too late')")
    with closing(Workers(queue, count=1)) as workers:
        with pytest.raises(RuntimeError, match="too late"):
            for _ in range(20):
                look(workers)


def test_a_worker_that_dies_later_is_replaced_as_often_as_it_takes(queue, monkeypatch, capfd):
    program = "import os, sys; os.write(int(sys.argv[3]), b'.'); raise SystemExit('later')"
    monkeypatch.setattr(Workers, "program", program)
    with closing(Workers(queue, count=1)) as workers:
        for _ in range(10):
            look(workers)
    assert capfd.readouterr().err.count("later") >= 10  # what workers say is shown
