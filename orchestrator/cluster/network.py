"""Network interface that a worker's collectives use."""

import os

from orchestrator.cluster.doctor.node import interface_of

INTERFACES = {"GLOO_SOCKET_IFNAME": "{}", "NCCL_SOCKET_IFNAME": "={}"}
"""Variables that name an interface to gloo and NCCL, and the form of their value. NCCL takes what follows "="
as a whole name, else as the beginning of one."""


def use_interface_of(address: str) -> None:
    """Makes gloo and NCCL of this process use the interface that has the node's Ray address, unless the user
    chose one.

    gloo by itself looks up the machine's name. On many hosts (containers, several networks, 127.0.1.1 in
    /etc/hosts) that gives an address which the other nodes cannot reach. NCCL takes the first interface that
    is neither loopback nor docker0: of several networks it may be the wrong one. Over InfiniBand it uses the
    interface for the rendezvous only.
    """
    if interface := interface_of(address):
        for variable, form in INTERFACES.items():
            os.environ.setdefault(variable, form.format(interface))
