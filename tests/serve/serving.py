"What the tests of the service share: a small model, pictures, a web server on this machine, and a network in which it may be reached."

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import numpy as np
import uvicorn
from PIL import Image

from snn.maths.model import Model
from snn.maths.network import initialise
from snn.maths.parameters import from_dict
from snn.serve.addresses import Network
from snn.serve.api import Settings, create
from snn.serve.model import Live, Sources


def small_model(seed=0, size=16):
    parameters = from_dict(
        {
            "epochs": 1,
            "layers": 3,
            "neurons": {"layer1": 6, "layer2": 4, "layer3": 1},
            "learning_rate": 0.1,
            "batch_size": 8,
            "seed": seed,
            "activations": {"layer1": "relu", "layer2": "tanh", "layer3": "sigmoid"},
            "threshold": 0,
        }
    )
    return Model(parameters, initialise(parameters, size * size * 3), size=size)


def photograph(width=60, height=40, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width * 2, height * 2))


def saved(image, kind="PNG", **options):
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


class Web(BaseHTTPRequestHandler):
    "A web server that behaves well and badly."

    picture = saved(photograph())

    def do_GET(self):
        self.server.seen.append((self.path, self.headers["Host"]))
        getattr(
            self, "do_" + self.path.strip("/").split(".")[0].split("?")[0], self.do_missing
        )()

    def send(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_cat(self):
        self.send(200, self.picture)

    def do_letter(self):
        self.send(200, b"Dear cat,", **{"Content-Type": "image/jpeg"})

    def do_moved(self):
        self.send(302, Location="/cat.png")

    def do_metadata(self):
        self.send(302, Location="http://169.254.169.254/latest/meta-data/")

    def do_inside(self):
        self.send(302, Location="http://[::ffff:10.0.0.1]/")

    def do_name(self):
        self.send(302, Location="http://inside.example/")

    def do_file(self):
        self.send(302, Location="file:///etc/passwd")

    def do_nowhere(self):
        self.send(302)

    def do_loop(self):
        self.send(302, Location="/loop")

    def do_missing(self):
        self.send(404)

    def do_announced(self):
        self.send(200, b"x", **{"Content-Length": str(10**12)})

    def do_gzip(self):
        self.send(200, b"\x1f\x8b\x08" + bytes(100), **{"Content-Encoding": "gzip"})

    def do_headers(self):
        self.send(200, self.picture, **{"X-Long": "x" * 200_000})

    def do_endless(self):
        self.send(200)
        try:
            while True:
                self.wfile.write(bytes(2**20))
        except OSError:
            pass

    def do_slow(self):
        self.send(200)
        try:
            while True:
                self.wfile.write(b"x")
                time.sleep(0.1)
        except OSError:
            pass

    def log_message(self, *rest):
        pass


class WebServer(ThreadingHTTPServer):
    "Keeps quiet when a client hangs up."

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Web)
        self.seen = []
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def handle_error(self, request, address):
        pass


NAMES = {
    "pictures.example": ["127.0.0.1"],
    "inside.example": ["10.0.0.1"],
    "mixed.example": ["127.0.0.1", "10.0.0.1"],
}


async def resolve(host, port):
    return NAMES.get(host, [host])


# In this network 127.0.0.1 stands for the whole internet; everything else is refused.
LOCAL = Network(is_allowed=lambda number: number == "127.0.0.1", ports=None, resolve=resolve)


class Running:
    "The service as a real server on a free port."

    def __init__(self, model_path, **settings):
        self.app = create(Live(Sources(model_path)), Settings(**settings))
        self.server = uvicorn.Server(
            uvicorn.Config(self.app, port=0, log_level="warning", access_log=False)
        )
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    def stop(self):
        self.server.should_exit = True
        self.thread.join(10)
