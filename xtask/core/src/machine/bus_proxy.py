# A proxy between the agent and the broker. Its arguments are the broker's address, its port and the planted fault:
# - watches-only-new: after the first boot, the agent's watch of the desired state begins at the end of the bucket.
# - deaf-after-rejoin: after the first boot, the agent's subscription to its commands is dropped.
# - stale-heartbeat: after the first boot, the agent's heartbeats get the boot id of the first boot.
# - loses-bus: each boot has one connection only.
# - waits-half-open: pings are answered by the proxy, and a new connection waits until the broker has closed the old one.
# - reconnects-without-pause: while the broker accepts no login, the proxy connects again and again.
# - trusts-clock: nothing is sent while the clock shows an earlier time than ever before.
# - forgets-on-full-disk: while the disk is full, the agent gets no changes of the desired state.
# - deaf-after-restart: once the broker was away, the agent may no longer watch the desired state.
import os
import re
import socket
import ssl
import sys
import threading
import time

BROKER, FAULT = (sys.argv[1], int(sys.argv[2])), sys.argv[3]
with open("/proc/sys/kernel/random/boot_id") as file:
    BOOT = file.read()
FIRST = "/var/lib/sabotage/first-boot"
if not os.path.exists(FIRST):
    with open(FIRST, "w") as file:
        file.write(BOOT)
    os.sync()
with open(FIRST) as file:
    FIRST_BOOT = file.read()
IS_FIRST_BOOT = FIRST_BOOT == BOOT
# The client's messages that have a payload; the last word is its size in bytes (NATS, client protocol).
WITH_PAYLOAD = re.compile(rb"H?PUB ", re.IGNORECASE)
# The number of connections of the agent so far, and the latest time that the clock has shown.
connections, latest = 0, 0.0
ONE_CONNECTION = threading.Lock()
# The time at which the broker has sent something, and whether it was away in this boot.
heard, was_away = 0.0, False
CONTEXT = ssl.create_default_context(cafile="/var/lib/sabotage/ca.pem")


def connect():
    """Returns a TLS connection to the broker, and the line that the broker sends before TLS, without its demand for TLS."""
    plain = socket.create_connection(BROKER)
    line = plain.recv(65536).replace(b'"tls_required":true', b'"tls_required":false')
    if not line:
        raise ConnectionResetError
    return CONTEXT.wrap_socket(plain, server_hostname=BROKER[0]), line


def is_full():
    disk = os.statvfs("/var/lib/iot-agent")
    return disk.f_bavail == 0


def messages(broker):
    """Returns what the broker sends, message by message, with the subject of each message."""
    stream = broker.makefile("rb")
    while line := stream.readline():
        words, payload = line.split(), b""
        if words and words[0].upper() in (b"MSG", b"HMSG"):
            payload = stream.read(int(words[-1]) + 2)
        yield line + payload, words[1] if payload else b""


def note_heard():
    global heard
    heard = time.monotonic()


def is_silent(broker):
    """Asks the broker for a sign of life."""
    before = heard
    broker.sendall(b"PING\r\n")
    for _ in range(50):
        if heard > before:
            return False
        time.sleep(0.1)
    return True


def from_broker(broker, first, agent):
    try:
        agent.sendall(first)
        if FAULT == "forgets-on-full-disk":
            for message, _ in messages(broker):
                if b"desired-state" not in message or not is_full():
                    agent.sendall(message)
        else:
            while data := broker.recv(65536):
                note_heard()
                agent.sendall(data)
        agent.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    agent.close()


def wait_for_clock():
    global latest
    while time.time() < latest - 1:
        time.sleep(0.5)
    latest = max(latest, time.time())


def from_agent(agent, broker):
    stream = agent.makefile("rb")
    while line := stream.readline():
        payload = b""
        if WITH_PAYLOAD.match(line):
            payload = stream.read(int(line.split()[-1]) + 2)
        if FAULT == "deaf-after-rejoin" and not IS_FIRST_BOOT and line.startswith(b"SUB device-commands."):
            continue
        if FAULT == "watches-only-new" and not IS_FIRST_BOOT and b"CONSUMER.CREATE" in line and line.startswith(b"PUB"):
            payload = payload.replace(b'"deliver_policy":"last_per_subject"', b'"deliver_policy":"new"')
            line = b" ".join(line.split()[:-1] + [b"%d\r\n" % (len(payload) - 2)])
        if FAULT == "stale-heartbeat" and b".heartbeat " in line:
            payload = payload.replace(BOOT.strip().encode(), FIRST_BOOT.strip().encode())
        if FAULT == "waits-half-open" and line.strip().upper() == b"PING":
            agent.sendall(b"PONG\r\n")
            continue
        if FAULT == "deaf-after-restart" and was_away and b"CONSUMER.CREATE" in line:
            continue
        if FAULT == "trusts-clock":
            wait_for_clock()
        broker.sendall(line + payload)


def storm():
    """Connects until the broker has accepted a login."""
    known = connections
    while connections == known:
        try:
            socket.create_connection(BROKER, timeout=1).close()
        except OSError:
            pass


def joined(agent):
    """Joins the agent with the broker until one of them closes its connection."""
    global connections, was_away
    try:
        broker, first = connect()
    except OSError:
        was_away = True
        raise
    connections += 1
    answers = threading.Thread(target=from_broker, args=(broker, first, agent), daemon=True)
    answers.start()
    try:
        from_agent(agent, broker)
    finally:
        if FAULT == "waits-half-open" and is_silent(broker):
            answers.join()
        broker.shutdown(socket.SHUT_RDWR)


def serve(agent):
    try:
        if FAULT == "waits-half-open":
            with ONE_CONNECTION:
                joined(agent)
        else:
            joined(agent)
    except OSError:
        pass
    agent.close()
    if FAULT == "reconnects-without-pause":
        storm()


listener = socket.create_server(("127.0.0.1", 4333))
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
    if FAULT == "loses-bus":
        listener.close()
        threading.Event().wait()
