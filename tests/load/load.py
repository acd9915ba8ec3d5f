"""How much the service takes: requests a second and their durations at 1, 8 and 64 connections, its memory over many requests,
and over many clients that leave.

    python tests/load/load.py [--seconds 10] [--requests 20000]

Starts `snn serve` with a made-up 20-7-5-1 network on this machine, asks it over the loopback, and stops it. Every loop is bounded."""

import argparse
import asyncio
import random
import re
import socket
import subprocess
import sys
import tempfile
from io import BytesIO
from pathlib import Path
from time import perf_counter
from urllib.request import urlopen

import numpy as np
from PIL import Image

from snn.data.models import write
from snn.maths.model import Model
from snn.maths.network import initialise
from snn.maths.parameters import from_dict

CONNECTIONS = (1, 8, 64)
HOST = "127.0.0.1"  # and never another
SERVE = "import sys; from pathlib import Path; from snn.cli.serve import serve; serve(Path(sys.argv[1]), port=0, at_a_time=128)"


def picture(width, height):
    "A JPEG with as much detail as a photograph."
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(
        rng.integers(0, 256, (height // 40 + 1, width // 40 + 1, 3), dtype=np.uint8)
    ).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(coarse).astype(float) + rng.normal(0, 6, (height, width, 3))
    file = BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=80)
    return file.getvalue()


def model(path):
    "An untrained 20-7-5-1 network for pictures of 64 pixels: as fast as a trained one."
    parameters = from_dict(
        {
            "epochs": 1,
            "layers": 4,
            "neurons": {"layer1": 20, "layer2": 7, "layer3": 5, "layer4": 1},
            "learning_rate": 0.1,
            "batch_size": 64,
            "threshold": 0,
            "activations": {
                "layer1": "relu",
                "layer2": "relu",
                "layer3": "relu",
                "layer4": "sigmoid",
            },
        }
    )
    write(Model(parameters, initialise(parameters, 64 * 64 * 3)), path)


def upload(content):
    "The bytes of a POST with a picture."
    body = (
        b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n'
        + content
        + b"\r\n--x--\r\n"
    )
    return (
        b"POST /predict HTTP/1.1\r\nHost: load\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: %d\r\n\r\n"
        % len(body)
        + body
    )


async def ask(reader, writer, request):
    "One request on an open connection; its status."
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    await reader.readexactly(int(re.search(rb"content-length: (\d+)", head)[1]))
    return int(head[9:12])


async def load(port, request, connections, seconds, most):
    "Ask over so many connections, as fast as they answer, for so long or so often; durations in seconds, and statuses."
    durations, statuses, end, left = [], set(), perf_counter() + seconds, most

    async def one():
        nonlocal left
        reader, writer = await asyncio.open_connection(HOST, port)
        while perf_counter() < end and left > 0:
            left -= 1
            start = perf_counter()
            statuses.add(await ask(reader, writer, request))
            durations.append(perf_counter() - start)
        writer.close()

    await asyncio.gather(*(one() for _ in range(connections)))
    return np.array(durations), statuses


def measured(port, name):
    "A number of the service's own."
    return float(
        re.search(
            rf"^{name} (\S+)$",
            urlopen(f"http://{HOST}:{port}/metrics").read().decode(),
            re.MULTILINE,
        )[1]
    )


def highest(pid):
    "Most memory that a process ever had, in MB."
    return int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1e3


def speed(port, name, request, seconds):
    print(
        f"\n{name}, {len(request) / 1000:.0f} kB\n\n| connections | requests/s | p50 ms | p99 ms | CPU ms |\n| --- | --- | --- | --- | --- |"
    )
    asyncio.run(load(port, request, 1, 2, 200))  # warm up
    for connections in CONNECTIONS:
        start, used = perf_counter(), measured(port, "process_cpu_seconds_total")
        durations, statuses = asyncio.run(load(port, request, connections, seconds, 10**6))
        took, used = perf_counter() - start, measured(port, "process_cpu_seconds_total") - used
        assert statuses == {200}, statuses
        p50, p99 = np.percentile(durations, [50, 99]) * 1000
        print(
            f"| {connections} | {len(durations) / took:,.0f} | {p50:.1f} | {p99:.1f} | {1000 * used / len(durations):.1f} |",
            flush=True,
        )


def work(port, name, request):
    "How much of a request is the picture and the network, and how much all the rest."
    before = [measured(port, f"snn_answer_seconds_{what}") for what in ("sum", "count")]
    durations, _ = asyncio.run(load(port, request, 1, 10, 500))
    total, count = (
        measured(port, f"snn_answer_seconds_{what}") - old
        for what, old in zip(("sum", "count"), before)
    )
    print(
        f"\n{name}: {1000 * durations.mean():.2f} ms a request, of which {1000 * total / count:.2f} ms ({total / durations.sum():.0%}) picture and network"
    )


def memory(port, request, most):
    print(
        f"\nMemory over {most:,} requests, 8 connections\n\n| requests | resident MB |\n| --- | --- |"
    )
    for done in range(0, most + 1, most // 10):
        if done:
            asyncio.run(load(port, request, 8, 300, most // 10))
        print(
            f"| {done:,} | {measured(port, 'process_resident_memory_bytes') / 1e6:.0f} |",
            flush=True,
        )


def leaving(port, request, most):
    "Clients that send the beginning of a request, and go."
    print(
        f"\n{most:,} clients that leave at a random point\n\n| clients | resident MB |\n| --- | --- |"
    )
    chance = random.Random(0)
    for done in range(0, most + 1, most // 4):
        for _ in range(most // 4 if done else 0):
            with socket.create_connection((HOST, port), timeout=10) as client:
                client.sendall(request[: chance.randrange(1, len(request))])
        resident = measured(port, "process_resident_memory_bytes") / 1e6
        print(f"| {done:,} | {resident:.0f} |", flush=True)
    text = urlopen(f"http://{HOST}:{port}/metrics").read().decode()
    print(f"\nStatus 5xx: {len(re.findall('status=.5[0-9][0-9]', text))}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds", type=float, default=10, help="at each number of connections"
    )
    parser.add_argument("--requests", type=int, default=20_000, help="for the memory")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "params.h5"
        model(path)
        server = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(path)], stdout=subprocess.PIPE, text=True
        )
        try:
            port = int(re.search(rf"http://{HOST}:(\d+)/", server.stdout.readline())[1])
            small, photo = upload(picture(64, 64)), upload(picture(1024, 768))
            speed(port, "A picture of 64 x 64 pixels", small, options.seconds)
            speed(port, "A photograph of 1024 x 768 pixels", photo, options.seconds)
            middling = upload(picture(320, 240))
            work(port, "64 x 64", small)
            work(port, "320 x 240", middling)
            work(port, "1024 x 768", photo)
            memory(port, middling, options.requests)
            leaving(port, middling, 2000)
            asyncio.run(load(port, upload(picture(4600, 3450)), 16, 20, 64))
            print(
                f"\nAfter 64 photographs of 16 megapixels, 16 at a time: {measured(port, 'process_resident_memory_bytes') / 1e6:.0f} MB; "
                f"at most {highest(server.pid):.0f} MB"
            )
        finally:
            server.terminate()
            server.wait(30)


if __name__ == "__main__":
    main()
