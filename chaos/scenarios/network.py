"""What lies between the web process and RabbitMQ fails: a proxy of ours."""

from chaos.scenario import scenario
from chaos.stage import Stage


@scenario("confirms come five seconds late", stage={"is_proxied": True}, crowd={"rate": 400})
def confirms_delayed(stage: Stage) -> None:
    for _ in range(2):
        stage.pause(2, 3)
        stage.did()
        stage.proxy.delay_seconds = 5
        stage.pause(12, 14)
        stage.proxy.delay_seconds = 0
        stage.is_back("rabbitmq")
        stage.pause(7, 8)


@scenario("confirms come a second late: late, but they come", stage={"is_proxied": True})
def confirms_slow(stage: Stage) -> None:
    stage.pause(1, 2)
    stage.did()
    stage.proxy.delay_seconds = 1
    stage.pause(10, 12)
    stage.proxy.delay_seconds = 0
    stage.pause(3, 4)


@scenario("confirms never come", stage={"is_proxied": True}, crowd={"rate": 400})
def confirms_dropped(stage: Stage) -> None:
    for _ in range(2):
        stage.pause(2, 3)
        stage.did()
        with stage.proxy.swallowing():
            stage.pause(6, 8)
        stage.is_back("rabbitmq")
        stage.pause(6, 7)


@scenario("connections to the broker are reset", stage={"is_proxied": True})
def connections_reset(stage: Stage) -> None:
    for _ in range(30):
        stage.pause(0.1, 1.2)
        stage.did()
        stage.proxy.reset()
    stage.is_back("rabbitmq")
    stage.pause(6, 7)


@scenario("web process and broker hear each other a few bytes at a time", stage={"is_proxied": True})
def bytes_trickle(stage: Stage) -> None:
    stage.pause(1, 2)
    stage.did()
    stage.proxy.slices = True
    stage.pause(10, 12)
    stage.proxy.slices = False
    stage.pause(2, 3)
