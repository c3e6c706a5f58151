"""Run commands in a separate network in which this machine has every address; report what they contact.

    unshare -rn python catch_network.py '[["command", "word"], …]'

It resolves every name to an address, listens on the ports that telemetry uses (53, 80, 443), prints JSON.
"""

import json
import socket
import subprocess
import sys
import threading

PORTS = (80, 443)


def name_of(question):
    labels, place = [], 12
    while question[place]:
        length = question[place]
        labels.append(question[place + 1 : place + 1 + length].decode(errors="replace"))
        place += length + 1
    return ".".join(labels)


def answer_names(server, contacts):
    while True:
        question, asker = server.recvfrom(4096)
        contacts.append(f"name {name_of(question)}")
        end = question.index(b"\0", 12) + 5
        head = question[:2] + b"\x81\x80\0\1\0\1\0\0\0\0"
        record = b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4" + socket.inet_aton("198.51.100.7")
        server.sendto(head + question[12:end] + record, asker)


def accept(server, port, contacts):
    while True:
        client, _ = server.accept()
        contacts.append(f"connection to {client.getsockname()[0]}:{port}")
        client.close()


def main():
    for command in ("ip link set lo up", "ip route add local 0.0.0.0/0 dev lo"):
        subprocess.run(command.split(), check=True)
    contacts = []
    names = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    names.bind(("0.0.0.0", 53))
    threading.Thread(target=answer_names, args=(names, contacts), daemon=True).start()
    for port in PORTS:
        server = socket.create_server(("0.0.0.0", port))
        threading.Thread(target=accept, args=(server, port, contacts), daemon=True).start()
    found = []
    for command in json.loads(sys.argv[1]):
        contacts.clear()
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        said = (done.stdout + done.stderr)[-2000:]
        found.append({"code": done.returncode, "contacts": sorted(set(contacts)), "said": said})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
