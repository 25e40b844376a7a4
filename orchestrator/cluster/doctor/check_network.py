"""Checks of the network: clocks, connections between nodes, the all-reduce, wandb's server, and Ray's
token."""

from ipaddress import ip_address
from statistics import median

from orchestrator.cluster.doctor.facts import AllReduce, ClusterFacts, ClusterRequirements
from orchestrator.cluster.doctor.findings import Finding, Level, all_nodes, listed
from orchestrator.core.format import size

CLOCK_S = 2.0
"""Seconds that a node's clock may be off before logs and metrics of several nodes cannot be read side by
side."""
SLOW_PAIR = 0.25
"""A pair below this part of the median pair is reported as slow; smaller differences are noise between busy
hosts."""


def check_clocks(facts: ClusterFacts, _: ClusterRequirements) -> list[Finding]:
    fix = "timedatectl set-ntp true there, or start chrony"
    return [
        Finding("clock", "warning", n.name, f"its clock is {n.clock_offset_s:+.1f} s off the driver's", fix)
        for n in facts.nodes
        if abs(n.clock_offset_s) > CLOCK_S
    ]


def check_connections(facts: ClusterFacts, _: ClusterRequirements) -> list[Finding]:
    """Every node has to reach every other on the ports that the system gives out."""
    ports = {node.name: node.ports for node in facts.nodes}
    findings = []
    for node in facts.nodes:
        for to in node.unreachable:
            what = f"{node.name} cannot reach {to.node} at {to.address} port {to.port}: {to.why}"
            first, last = ports[to.node]
            fix = (
                f"let TCP ports {first}-{last} in on {to.node}, from which the master port, gloo and NCCL "
                f"take theirs: iptables -I INPUT -p tcp -s {node.address} --dport {first}:{last} -j ACCEPT"
            )
            findings.append(Finding("network", "error", f"{node.name} -> {to.node}", what, fix))
    if findings or len(facts.nodes) < 2:
        return findings
    directions = len(facts.nodes) * (len(facts.nodes) - 1)
    what = f"every node reaches every other ({directions} directions)"
    return [Finding("network", "ok", all_nodes(facts), what)]


def check_all_reduce(facts: ClusterFacts, _: ClusterRequirements) -> list[Finding]:
    """The all-reduce has to work. Its rate is reported, and pairs of nodes that are much slower than most."""
    result = facts.all_reduce
    if result is None:
        alone = len(facts.capacities) == 1
        level: Level = "ok" if alone else "warning"
        fix = "" if alone else "fix the errors above first"
        return [Finding("all-reduce", level, all_nodes(facts), f"not measured: {facts.skipped}", fix)]
    where = listed(result.nodes)
    if result.error is not None:
        fix = _all_reduce_fix(facts, result)
        return [Finding("all-reduce", "error", where, f"{result.backend}: {result.error}", fix)]
    over = f" over {result.ranks} GPUs of each" if result.ranks > 1 else ""
    milliseconds = f"{result.seconds * 1e3:.1f} ms"
    what = f"{result.backend}{over}, {size(result.size)} in {milliseconds}: {_rate(result.rate)}"
    return [Finding("all-reduce", "ok", where, what), *_slow_pairs(result)]


def _all_reduce_fix(facts: ClusterFacts, result: AllReduce) -> str:
    variable = "NCCL_SOCKET_IFNAME" if result.backend == "nccl" else "GLOO_SOCKET_IFNAME"
    fixes = [
        f"on {n.name}: export {variable}={n.interface} before ray start"
        for n in facts.nodes
        if n.interface and n.name in result.nodes
    ]
    if result.backend == "nccl":
        fixes.append("NCCL_DEBUG=INFO shows more")
    return "; ".join(fixes)


def _slow_pairs(result: AllReduce) -> list[Finding]:
    usual = median(p.rate for p in result.pairs) if len(result.pairs) > 1 else 0.0
    findings = []
    for pair in result.pairs:
        if pair.rate < SLOW_PAIR * usual:
            what = f"{_rate(pair.rate)} between them, {_rate(usual)} between most"
            fix = (
                f"look at the link of the two (ethtool on its interface, iperf3 -c {pair.other}), or "
                "leave the slower one out"
            )
            findings.append(Finding("all-reduce", "warning", f"{pair.one} - {pair.other}", what, fix))
    return findings


def _rate(rate: float) -> str:
    return f"{rate / 1e9:.2f} GB/s"


def check_wandb(facts: ClusterFacts, need: ClusterRequirements) -> list[Finding]:
    where = facts.nodes[0].name
    if need.wandb != "online":
        return [Finding("wandb", "ok", where, f"not needed: tracking.wandb={need.wandb}")]
    if facts.wandb is None:
        return [Finding("wandb", "ok", where, "its server answers and a key is there")]
    fix = (
        "wandb login (or export WANDB_API_KEY), HTTPS_PROXY or WANDB_BASE_URL as your network needs; or "
        "set tracking.wandb=offline"
    )
    return [Finding("wandb", "warning", where, f"{facts.wandb}; the run would be recorded offline", fix)]


def check_auth(facts: ClusterFacts, _: ClusterRequirements) -> list[Finding]:
    """Ray has to ask for a token, unless it is reachable from its own machine only. An error on public
    addresses, a warning on private ones."""
    addresses = [node.address for node in facts.nodes]
    if facts.auth:
        return [Finding("auth", "ok", all_nodes(facts), "Ray asks for a token")]
    if all(address.startswith("127.") or address == "::1" for address in addresses):
        return [Finding("auth", "ok", all_nodes(facts), "Ray listens on the loopback address only")]
    fix = (
        "ray get-auth-token --generate on the head; copy ~/.ray/auth_token (mode 600) to every node; "
        "export RAY_AUTH_MODE=token; then ray stop and ray start on every node"
    )
    what = (
        "it is unknown whether Ray asks for a token"
        if facts.auth is None
        else "Ray asks for no token: whoever reaches its ports runs code as you"
    )
    level: Level = "warning" if all(ip_address(address).is_private for address in addresses) else "error"
    return [Finding("auth", level, all_nodes(facts), what, fix)]
