"""Which network a worker speaks on."""

import os

from orchestrator.node_facts import interface_of

GLOO = "GLOO_SOCKET_IFNAME"


def speak_from(address: str) -> None:
    """Makes gloo of this process use the interface that has the node's Ray address, unless the user chose one.

    gloo itself looks up the machine's name, which on many hosts (containers, several networks, 127.0.1.1 in /etc/hosts) is
    an address that the other nodes cannot reach. NCCL looks for itself.
    """
    if GLOO in os.environ:
        return
    if interface := interface_of(address):
        os.environ[GLOO] = interface
