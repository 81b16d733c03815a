# Writes the device's status and heartbeat every second, with the device's own credentials, while no agent runs. It is the planted
# fault forged-status. Its argument is the agent's configuration.
import hashlib
import json
import os
import re
import socket
import ssl
import sys
import time

with open(sys.argv[1]) as file:
    CONFIG = file.read()
with open("/usr/local/bin/iot-agent", "rb") as file:
    DIGEST = hashlib.sha256(file.read()).hexdigest()
with open("/proc/sys/kernel/random/boot_id") as file:
    BOOT = file.read().strip()
with open("/etc/os-release") as file:
    OS = dict(line.strip().replace('"', "").split("=", 1) for line in file if "=" in line)


def value(name):
    return re.search(rf'^{name} = "(.*)"', CONFIG, re.MULTILINE)[1]


DEVICE = value("device_id")
host, port = re.search(r"tls://(.*):(\d+)", CONFIG).groups()
plain = socket.create_connection((host, int(port)))
# The server sends one line before TLS.
plain.recv(65536)
context = ssl.create_default_context(cafile="/etc/iot-agent/secrets/ca.pem")
broker = context.wrap_socket(plain, server_hostname=host)
login = {"user": value("username"), "pass": value("password"), "verbose": False, "pedantic": False, "lang": "python"}
broker.sendall(f"CONNECT {json.dumps(login)}\r\n".encode())
for sequence in range(1, 2000, 2):
    status = {
        "schema": 1,
        "device_id": DEVICE,
        "agent_version": "0.1.0",
        "exe_sha256": DIGEST,
        "boot_id": BOOT,
        "machine": os.uname().machine,
        "os_release": {"id": OS["ID"], "version_id": OS["VERSION_ID"]},
        "kernel": os.uname().release,
        "uptime_seconds": 1,
        "sequence": sequence,
        "deployments": [],
    }
    heartbeat = {key: status[key] for key in ("schema", "device_id", "exe_sha256", "boot_id", "uptime_seconds")}
    heartbeat |= {"sequence": sequence + 1, "desired_revision": 0}
    for key, document in ((DEVICE, status), (f"{DEVICE}.heartbeat", heartbeat)):
        text = json.dumps(document)
        broker.sendall(f"PUB $KV.agent-status.{key} {len(text)}\r\n{text}\r\nPONG\r\n".encode())
    time.sleep(1)
