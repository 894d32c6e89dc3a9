"""A server with TLS, whose certificate can be renewed while it serves.

    python examples/tls_server.py --cert server.pem --key server.key

A certificate to try it with, and a client in another terminal:

    openssl req -x509 -newkey rsa:2048 -nodes -days 30 -subj /CN=localhost -keyout server.key -out server.pem
    openssl s_client -quiet -connect 127.0.0.1:8443

Exchange the two files, send SIGHUP to the process whose number it prints, and the next client gets the new certificate;
those that are connected stay. With --client-ca only clients with a certificate are served. Ctrl-C stops it.
"""

from __future__ import annotations

import argparse
import os
import signal
from types import FrameType

import fastserve


class Greeter(fastserve.StreamRequestHandler):
    """Say who is there and how the connection is protected, and answer lines in capital letters."""

    timeout = 60.0

    def handle(self) -> None:
        certificate = self.request.getpeercert() or {}
        names = [value for _, value in certificate.get("subjectAltName", ())]
        self.wfile.write(f"hello {', '.join(names) or 'stranger'}, over {self.request.version()}\n".encode())
        for line in self.rfile:
            self.wfile.write(line.upper())


class Server(fastserve.TLSMixIn, fastserve.ThreadingTCPServer):
    """The mix-in comes first. A thread does the handshake of its client: who stays silent holds up nobody."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description="Serve with TLS.")
    parser.add_argument("--cert", required=True, help="a file with the certificate, in PEM")
    parser.add_argument("--key", required=True, help="a file with its private key, in PEM")
    parser.add_argument("--client-ca", help="a file with the certificates that sign those of clients, in PEM")
    parser.add_argument("--port", type=int, default=8443)
    arguments = parser.parse_args()
    Server.tls_cert = arguments.cert
    Server.tls_key = arguments.key
    Server.tls_client_ca = arguments.client_ca

    with Server(("127.0.0.1", arguments.port), Greeter) as server:

        def reload(signum: int, frame: FrameType | None) -> None:
            try:
                server.reload_certificates()
                print("the certificate was loaded again", flush=True)
            except OSError as error:
                print(f"the certificate stays what it was: {error}", flush=True)

        signal.signal(signal.SIGHUP, reload)
        print(f"process {os.getpid()} listening on 127.0.0.1:{server.server_address[1]}", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")


if __name__ == "__main__":
    main()
