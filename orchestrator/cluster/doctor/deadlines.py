"""How long the doctor waits for what it asks a node, a server or a program."""

START_S = 90.0
"""Start of a worker process, with the import of the program, on a busy or far node."""
REQUEST_S = 60.0
"""One request to a node."""
GRACE_S = 10.0
"""Time on top of a deadline that the other side keeps itself: its own message is more precise."""
CONNECT_S = 3.0
"""One TCP connection: a firewall that drops packets is only recognised by waiting."""
SETTLE_S = 10.0
"""Time until a file written on one node is seen on another."""
COLLECTIVE_S = 60.0
"""Time for processes to join a process group, and for each measurement."""
ANSWER_S = 5.0
"""One request to a web server."""
SMI_S = 20.0
"""nvidia-smi: without the persistence daemon it loads the driver first."""
GPU_CHECK_S = 120.0
"""A process that imports torch and computes on every GPU of a node."""
