"""Serve _site/ on this machine, at the port that is asked for or the next one that is free.

    python site/serve.py 8000
"""
import errno
import functools
import signal
import sys
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

from notebooks import ROOT


class Quiet(SimpleHTTPRequestHandler):
    """Serves files, and says nothing: the address stays the last line of the terminal."""

    def log_message(self, *args):
        pass


def server(folder, port: int, n_tries: int = 100) -> ThreadingHTTPServer:
    """A server of `folder` at the first port from `port` on that can be had."""
    handler = functools.partial(Quiet, directory=str(folder))
    for candidate in range(port, min(port + n_tries, 65536)):
        try:
            return ThreadingHTTPServer(("127.0.0.1", candidate), handler)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
    raise SystemExit(f"No port from {port} on is free; name another with: make book PORT=9000")


def main() -> None:
    if len(sys.argv) != 2 or not sys.argv[1].isdigit():
        sys.exit(__doc__)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` would have it ignored
    with server(ROOT / "_site", int(sys.argv[1])) as serving:
        print(f"The book is at http://127.0.0.1:{serving.server_port}/  (Ctrl-C stops it)", flush=True)
        try:
            serving.serve_forever()
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    main()
