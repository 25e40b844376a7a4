"""A probe's door stays open whoever knocks."""

import socket
import struct
import threading
from contextlib import closing

from orchestrator.cluster.probe_actor import Door, _answer, _knock


def test_a_visitor_who_hangs_up_leaves_the_door_open() -> None:
    server = socket.create_server(("127.0.0.1", 0))
    address = server.getsockname()
    hasty = socket.create_connection(address)
    hasty.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing resets the connection
    hasty.close()
    with closing(server):
        threading.Thread(target=_answer, args=(server, b"nonce"), daemon=True).start()
        assert _knock(Door("n", *address), b"nonce") is None
        assert _knock(Door("n", *address), b"other") == "something else answers there"
