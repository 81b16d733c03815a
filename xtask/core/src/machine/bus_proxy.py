# A proxy between the agent and the broker. Its arguments are the broker's address, its port and the planted fault:
# - watches-only-new: after the first boot, the agent's watch of the desired state begins at the end of the bucket.
# - deaf-after-rejoin: after the first boot, the agent's subscription to its commands is dropped.
# - stale-heartbeat: after the first boot, the agent's heartbeats get the boot id of the first boot.
# - loses-bus: each boot has one connection only.
import os
import re
import socket
import ssl
import sys
import threading

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
CONTEXT = ssl.create_default_context(cafile="/var/lib/sabotage/ca.pem")


def connect():
    """Returns a TLS connection to the broker, and the line that the broker sends before TLS, without its demand for TLS."""
    plain = socket.create_connection(BROKER)
    line = plain.recv(65536).replace(b'"tls_required":true', b'"tls_required":false')
    return CONTEXT.wrap_socket(plain, server_hostname=BROKER[0]), line


def from_broker(broker, first, agent):
    try:
        agent.sendall(first)
        while data := broker.recv(65536):
            agent.sendall(data)
        agent.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    agent.close()


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
        broker.sendall(line + payload)


def serve(agent):
    try:
        broker, first = connect()
        threading.Thread(target=from_broker, args=(broker, first, agent), daemon=True).start()
        from_agent(agent, broker)
        broker.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    agent.close()


listener = socket.create_server(("127.0.0.1", 4333))
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
    if FAULT == "loses-bus":
        listener.close()
        threading.Event().wait()
