# One end of a session of OpenSSL, on the connection that is standard input: it writes a pattern, and compares what it reads.
# Standard output is a UNIX socket. There it hears `m` (take another socket as soon as bytes have gone both ways), `s` (stop
# writing, and say how much it was), and `e` (end with so many bytes).
import os, select, socket, ssl, struct, sys

TABLE = bytes(range(251)) * 100


def pattern(position, length):
    return TABLE[position % 251 : position % 251 + length]


is_server = sys.argv[1] == "server"
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if is_server else ssl.PROTOCOL_TLS_CLIENT)
if is_server:
    context.load_cert_chain("certificate", "key")
else:
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
context.minimum_version = context.maximum_version = ssl.TLSVersion[sys.argv[2]]
context.set_ciphers(sys.argv[3])
tls = context.wrap_socket(socket.socket(fileno=0), server_side=is_server)
tls.setblocking(False)
control = socket.socket(fileno=1)
control.sendall(b"h")

sent = received = 0
pending = b""
before = expected = None
stopping = False
while received != expected:
    readable = select.select([tls, control], [tls] if pending or not stopping else [], [])[0]
    if control in readable:
        command = control.recv(1)
        if command == b"m":
            before = sent, received
        elif command == b"s":
            stopping = True
            pending = pending or pattern(sent, 1)
        else:
            (expected,) = struct.unpack("=Q", control.recv(8))
    try:
        data = tls.recv(20000)
        assert data and data == pattern(received, len(data)), f"other bytes behind {received}"
        received += len(data)
    except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
        pass
    if pending or not stopping:
        # What OpenSSL could not write it wants to see again.
        pending = pending or pattern(sent, 500 + sent % 19000)
        try:
            length = tls.send(pending)
            sent, pending = sent + length, pending[length:]
            if stopping and not pending:
                control.sendall(struct.pack("=Q", sent))
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
    if before and sent > before[0] and received > before[1]:
        control.sendall(b"r")
        (new,) = socket.recv_fds(control, 1, 1)[1]
        os.dup2(new, 0)
        os.close(new)
        tls.setblocking(False)
        before = None
control.sendall(b"d")
control.recv(1)
