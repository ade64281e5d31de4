"""A peer whose urgent segment overtakes the one before it: prints the server's share of a core.

For a network namespace of its own (unshare -rn).  The peer is a raw socket with an address
at the end of a cable where nobody is, so that no kernel answers in its place.
"""

import atexit
import socket
import struct
import subprocess

from peers import PATTERN
from processes import Server, cpu_share

HERE, THERE, PORT = "10.9.9.1", "10.9.9.9", 5555
FIN, SYN, ACK, URG = 1, 2, 16, 32


def checksum(data):
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


def segment(port, seq, ack, flags, data=b"", urgent=0):
    """RFC 9293, section 3.1, with its pseudo-header for the checksum."""
    data += bytes(len(data) % 2)
    fields = [PORT, port, seq, ack, 5 << 4, flags, 65535, 0, urgent]
    ends = socket.inet_aton(THERE) + socket.inet_aton(HERE)
    header = struct.pack("!HHIIBBHHH", *fields)
    fields[7] = checksum(ends + struct.pack("!HH", 6, 20 + len(data)) + header + data)
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 40 + len(data), 0, 0, 64, 6, 0) + ends
    return ip + struct.pack("!HHIIBBHHH", *fields) + data


for command in (
    "link set lo up",
    "link add v0 type veth peer name v1",
    "link set v1 up",
    "link set v0 up",
    f"addr add {HERE}/24 dev v0",
    f"neigh add {THERE} lladdr 02:00:00:00:00:09 dev v0",
):
    subprocess.run(["ip", *command.split()], check=True)
sniffer = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800))
sniffer.settimeout(10)
raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
server = Server("--host", HERE)
atexit.register(server.process.kill)
raw.sendto(segment(server.port, 1000, 0, SYN), (HERE, 0))
answer = b""
while answer[20:24] != struct.pack("!HH", server.port, PORT):
    answer = sniffer.recv(2000)
theirs = struct.unpack("!I", answer[24:28])[0] + 1
raw.sendto(segment(server.port, 1001, theirs, ACK), (HERE, 0))
server.wait_for_log("opened")
raw.sendto(segment(server.port, 1011, theirs, ACK | URG, PATTERN[10:20], urgent=10), (HERE, 0))
share = cpu_share(server.pid, 0.5)
raw.sendto(segment(server.port, 1001, theirs, ACK, PATTERN[:10]), (HERE, 0))
raw.sendto(segment(server.port, 1021, theirs, ACK | FIN), (HERE, 0))
server.wait_for_log("closed: 20 bytes in, 20 out")
print(share)
server.clean_up()
