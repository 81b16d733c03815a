# A proxy in front of podman that answers each request to stop or remove a container with success, but does not pass it
# on. It is the planted fault ignores-deletes.
import re
import socket
import threading

HERE, REAL = "/run/iot-agent/podman.sock", "/run/iot-agent/real.sock"
ENDS = re.compile(rb"POST \S*/containers/[^/]+/(stop|kill)\b|DELETE \S*/containers/")


def pipe(source, sink):
    try:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        sink.close()


def serve(client):
    head = b""
    while b"\r\n\r\n" not in head:
        data = client.recv(65536)
        if not data:
            return
        head += data
    if ENDS.match(head):
        client.sendall(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
        client.close()
        return
    podman = socket.socket(socket.AF_UNIX)
    podman.connect(REAL)
    # Allow one request per connection, so that the proxy reads every request.
    podman.sendall(head.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
    threading.Thread(target=pipe, args=(client, podman), daemon=True).start()
    pipe(podman, client)


listener = socket.socket(socket.AF_UNIX)
listener.bind(HERE)
listener.listen(64)
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
