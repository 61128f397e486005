"""A judge that misbehaves as the problem's ground truth names: a list of behaviours, one for each request about the problem,
the last for all others. Run as a script, it prints its port. GET /counts gives the requests and connections so far.
"""

import json
import sys
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "token-of-the-judge"
counts: Counter = Counter()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self):
        super().setup()
        counts["connections"] += 1

    def do_GET(self):
        self.reply(200, json.dumps({name: counts[name] for name in ("connections", "requests")}).encode())

    def do_POST(self):
        counts["requests"] += 1
        message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        problem, texts = message["problem"], [response["text"] for response in message["responses"]]
        behaviours = problem["ground_truth"].split(",")
        number = counts[problem["id"], texts[0]]
        counts[problem["id"], texts[0]] += 1
        behaviour = behaviours[min(number, len(behaviours) - 1)]
        getattr(self, f"do_{behaviour}")(texts, message)

    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def scores(self, values):
        self.reply(200, json.dumps({"scores": values}).encode())

    def do_good(self, texts, message):
        self.scores([len(text) for text in texts])

    def do_full(self, texts, message):
        self.scores(
            [{"reward": 0.5, "accuracy": 1, "answer": text, "extra": {"length": len(text)}} for text in texts]
        )

    def do_echo(self, texts, message):
        self.scores([{"reward": 1, "extra": message} for _ in texts])

    def do_token(self, texts, message):
        if self.headers["Authorization"] == f"Bearer {TOKEN}":
            self.do_good(texts, message)
        else:
            self.reply(401, b"wrong token " + str(self.headers["Authorization"]).encode())

    def do_500(self, texts, message):
        self.reply(500)

    def do_404(self, texts, message):
        self.reply(404)

    def do_429(self, texts, message):
        self.reply(429, Retry_After="0")

    def do_later(self, texts, message):
        self.reply(429, Retry_After="3600")

    def do_hang(self, texts, message):
        time.sleep(5)

    def do_close(self, texts, message):
        self.close_connection = True

    def do_afterwards(self, texts, message):
        """Answers, and closes the connection without saying so."""
        self.do_good(texts, message)
        self.close_connection = True

    def do_drip(self, texts, message):
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        try:
            for _ in range(1000):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.05)
        except OSError:
            self.close_connection = True

    def do_headers(self, texts, message):
        try:
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            for number in range(100):
                self.wfile.write(f"X-{number}: 1\r\n".encode())
                self.wfile.flush()
                time.sleep(0.05)
        except OSError:
            self.close_connection = True

    def do_large(self, texts, message):
        self.reply(200, b" " * (16 * 2**20 + 1))

    def do_text(self, texts, message):
        self.reply(200, b"I would give it a ten")

    def do_nan(self, texts, message):
        self.reply(200, b'{"scores": [' + b",".join([b"NaN"] * len(texts)) + b"]}")

    def do_few(self, texts, message):
        self.scores([1] * (len(texts) + 1))

    def do_redirect(self, texts, message):
        self.reply(307, Location="http://elsewhere.example/take?it=1")

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64


if __name__ == "__main__":
    server = Server(("127.0.0.1", int(sys.argv[1]) if len(sys.argv) > 1 else 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
