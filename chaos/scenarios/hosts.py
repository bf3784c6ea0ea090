"""Hosts die, with all that runs on them."""

from chaos.hosts import HOSTS, Hosts
from chaos.scenario import scenario
from chaos.stage import Stage

# Without a vote accepted, or counted, or results shown (seconds).
_LONGEST_GAPS = {"accepted": 5.0, "counted": 20.0, "shown": 5.0}


def _keep_postgres(stage: Stage) -> None:
    assert isinstance(stage, Hosts)
    stage.keep_postgres()


def _judge_gaps(stage: Stage) -> None:
    assert isinstance(stage, Hosts)
    ends = [*(at for _, at in stage.died[1:]), stage.load_ended_at]
    for (host, died_at), end in zip(stage.died, ends, strict=True):
        gaps = stage.gaps(died_at - 1, min(end, died_at + 60))
        stage.notes.append(f"{host}: " + ", ".join(f"{name} again after {gap:.1f} s" for name, gap in gaps.items()))
        stage.complaints += [f"{host}: nothing {name} for {gap:.1f} s" for name, gap in gaps.items() if gap > _LONGEST_GAPS[name]]


def _kill(stage: Hosts, host: int) -> tuple[str, float]:
    """Kill it; return what it was, and when it died."""
    if stage.keeper.primary not in HOSTS[host]:
        had = "the standby" if stage.keeper.standby in HOSTS[host] else "no PostgreSQL"
        return f"host {host} with {had}", stage.kill_host(host)
    # The standby hears nothing from just before: commits that do not wait for it would be lost for sure.
    with stage.keeper.looking_away():
        stage.keeper.cut_off_standby()
        stage.pause(0.5, 1)
        return f"host {host} with the primary", stage.kill_host(host)


@scenario(
    "three hosts: each is killed as a whole, PostgreSQL's primary included, and comes back",
    on=Hosts,
    stage={"nodes": 3, "standby": True, "twins": ("web", "worker")},
    before=_keep_postgres,
    after=_judge_gaps,
    crowd={"rate": 300},
)
def host_killed(stage: Stage) -> None:
    assert isinstance(stage, Hosts)
    for host in stage.dice.sample(list(HOSTS), len(HOSTS)):
        stage.pause(2, 4)
        stage.died.append(_kill(stage, host))
        stage.pause(12, 15)
        stage.start_host(host)
        stage.wait_until_whole()
    stage.pause(2, 4)
