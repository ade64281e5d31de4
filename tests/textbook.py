#!/usr/bin/env python3
"""The echo loop of the tutorials, made anew and short, with its mistakes; for comparison.

usage: textbook.py [PORT]
"""

import queue
import select
import socket
import sys

READ_ONLY = select.POLLIN | select.POLLPRI | select.POLLHUP | select.POLLERR
READ_WRITE = READ_ONLY | select.POLLOUT

listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.setblocking(False)
listener.bind(("localhost", int(sys.argv[1] if sys.argv[1:] else 8800)))
listener.listen(5)
print("listening on port", listener.getsockname()[1], flush=True)
poller = select.poll()
poller.register(listener, READ_ONLY)
fd_to_socket = {listener.fileno(): listener}
message_queues = {}


def close(peer):
    poller.unregister(peer)
    peer.close()
    del message_queues[peer]


while True:
    for fd, flag in poller.poll(1000):
        ready = fd_to_socket[fd]
        if flag & (select.POLLIN | select.POLLPRI):
            if ready is listener:
                peer, _ = listener.accept()
                peer.setblocking(False)
                poller.register(peer, READ_ONLY)
                fd_to_socket[peer.fileno()] = peer
                message_queues[peer] = queue.Queue()
            elif data := ready.recv(1024):
                message_queues[ready].put(data)
                poller.modify(ready, READ_WRITE)
            else:
                close(ready)
        elif flag & select.POLLHUP:
            close(ready)
        elif flag & select.POLLOUT:
            try:
                ready.send(message_queues[ready].get_nowait())
            except queue.Empty:
                poller.modify(ready, READ_ONLY)
        elif flag & select.POLLERR:
            close(ready)
