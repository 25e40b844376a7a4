"""Which network a worker speaks on."""

import os

from orchestrator.cluster.doctor.node import interface_of

INTERFACES = {"GLOO_SOCKET_IFNAME": "{}", "NCCL_SOCKET_IFNAME": "={}"}
"""How gloo and NCCL are told of an interface; NCCL takes what follows "=" as a whole name, else as the
beginning of one."""


def speak_from(address: str) -> None:
    """Makes gloo and NCCL of this process use the interface that has the node's Ray address, unless the user
    chose one.

    gloo itself looks up the machine's name, which on many hosts (containers, several networks, 127.0.1.1 in
    /etc/hosts) is an address that the other nodes cannot reach. NCCL takes the first one that is no loopback
    or docker0: of several networks it may be the wrong one. Over InfiniBand it only meets there.
    """
    if interface := interface_of(address):
        for variable, form in INTERFACES.items():
            os.environ.setdefault(variable, form.format(interface))
