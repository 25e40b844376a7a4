"""What Ray starts in place of a worker's interpreter: it requests the worker from the fork server
(forkserver.py), and ends as the worker ends.

It imports the standard library only, to start in hundredths of a second.
"""

import json
import os
import signal
import socket
import sys


def main(address: str, *command: str) -> int:
    """Runs the worker `command` (a script and its arguments); its exit code, or minus the signal that ended
    it."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    request = {
        "command": command,
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "blocked": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())],
        "ignored": [int(number) for number in signals if signal.getsignal(number) == signal.SIG_IGN],
    }
    message = json.dumps(request).encode()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        try:
            server.connect(address)
        except OSError:  # the server was killed: start the worker without it
            os.execv(sys.executable, [sys.executable, *command])
        socket.send_fds(server, [len(message).to_bytes(8)], [0, 1, 2])
        server.sendall(message)
        return int(server.recv(64) or b"1")


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    if code < 0:
        if -code not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)
