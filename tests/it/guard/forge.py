"""A TCP client made by hand, of frames on a raw packet socket: it asks for / and prints the answer's last line.

forge.py <interface> <source> <source MAC> <destination> <destination MAC> <port> <VLAN tags, or "fragments">
"""
import random
import socket
import struct
import sys
import time

interface, source, own, target, gateway, port, tags = sys.argv[1:8]
port, six = int(port), ":" in source
# The flags of TCP are in the second. Linux takes no such fragments of IPv6.
fragments = tags == "fragments" and not six
tags = 0 if tags == "fragments" else int(tags)
family = socket.AF_INET6 if six else socket.AF_INET
source, target = (socket.inet_pton(family, text) for text in (source, target))
own, gateway = (bytes.fromhex(text.replace(":", "")) for text in (own, gateway))
wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
wire.bind((interface, 0))
wire.settimeout(0.2)
here, number = random.randint(20000, 60000), random.randint(1, 1 << 31)
SYN, ACK, PSH, FIN = 2, 16, 8, 1


def checksum(data):
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def send(flags, number, acknowledged, data=b""):
    tcp = struct.pack("!HHIIBBHHH", here, port, number, acknowledged, 5 << 4, flags, 65535, 0, 0)
    length = len(tcp + data)
    pseudo = source + target + struct.pack("!IHBB", length, 0, 0, 6) if six else (
        source + target + struct.pack("!BBH", 0, 6, length))
    tcp = tcp[:16] + struct.pack("!H", checksum(pseudo + tcp + data)) + tcp[18:]
    kind = struct.pack("!H", 0x86DD if six else 0x0800)
    start = gateway + own + struct.pack("!HH", 0x8100, 0) * tags + kind
    if six:
        packet = struct.pack("!IHBB", 6 << 28, length, 6, 64) + source + target
        return wire.send(start + packet + tcp + data)
    whole = tcp + data
    parts = [(0x2000, whole[:8]), (1, whole[8:])] if fragments and flags & SYN else [(0, whole)]
    identity = random.randint(1, 65535)
    for offset, part in parts:
        packet = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(part), identity, offset, 64, 6, 0)
        packet += source + target
        packet = packet[:10] + struct.pack("!H", checksum(packet)) + packet[12:]
        wire.send(start + packet + part)


def answers(until):
    while time.time() < until:
        try:
            frame = wire.recv(65536)
        except TimeoutError:
            yield None
            continue
        packet = frame[14:]
        if six:
            if frame[12:14] != b"\x86\xdd" or packet[6] != 6 or packet[24:40] != source:
                continue
            tcp, end = packet[40:], 40 + struct.unpack("!H", packet[4:6])[0]
        else:
            if frame[12:14] != b"\x08\0" or packet[9] != 6 or packet[16:20] != source:
                continue
            head = (packet[0] & 15) * 4
            tcp, end = packet[head:], struct.unpack("!H", packet[2:4])[0]
        tcp = packet[len(packet) - len(tcp):end]
        if len(tcp) >= 20 and struct.unpack("!HH", tcp[:4]) == (port, here):
            yield struct.unpack("!I", tcp[4:8])[0], tcp[13], tcp[(tcp[12] >> 4) * 4:]


send(SYN, number, 0)
expected, body = None, b""
for answer in answers(time.time() + 2):
    if answer is None:
        if expected is None:
            send(SYN, number, 0)
        continue
    sequence, flags, data = answer
    if flags & 4:
        break
    if expected is None and flags & SYN:
        expected, asked = sequence + 1, b"GET / HTTP/1.0\r\nHost: x\r\n\r\n"
        send(ACK, number + 1, expected)
        send(ACK | PSH, number + 1, expected, asked)
        number += 1 + len(asked)
    elif expected == sequence and (data or flags & FIN):
        body += data
        expected += len(data) + (flags & FIN)
        send(ACK, number, expected)
        if flags & FIN or body.partition(b"\r\n\r\n")[2]:
            break
print(body.decode(errors="replace").strip().splitlines()[-1] if body else "nothing")
