#!/bin/sh
# A connection leaves a server that knows nothing of it, and goes on in another program. Its client does not notice.
# As an ordinary user, in a private network:  unshare -Urn sh docs/walkthrough.sh
set -eu
command -v soccr >/dev/null || { echo "soccr is not in PATH" >&2; exit 1; }
ip link set lo up
directory=$(mktemp -d)
mkfifo "$directory/requests"
programs=
end() {
    for program in $programs; do
        kill "$program" 2>/dev/null || true
    done
    wait
    rm -r "$directory"
}
trap end EXIT

python3 -c '
import socket
connection, _ = socket.create_server(("127.0.0.1", 7000)).accept()
try:
    while data := connection.recv(100): connection.sendall(b"first server: " + data)
except OSError:
    pass  # the connection has left
' &
server=$!
programs=$server
until soccr list --pid $server | grep -q LISTEN; do sleep 0.1; done

python3 -uc '
import socket, sys
connection = socket.create_connection(("127.0.0.1", 7000)).makefile("rw", buffering=1)
for line in sys.stdin:
    print(line.rstrip(), file=connection)
    print(connection.readline(), end="")
' > "$directory/answers" < "$directory/requests" &
programs="$programs $!"
exec 3> "$directory/requests"
echo hello >&3
until grep -q hello "$directory/answers"; do sleep 0.1; done

descriptor=$(soccr list --pid $server | awk '/ESTAB/ { print $2 }')
soccr save --pid $server --fd "$descriptor" -o "$directory/connection.soccr"
soccr inspect "$directory/connection.soccr"
soccr restore "$directory/connection.soccr" --stdio -- sed -u 's/^/second server: /' &
programs="$programs $!"

echo again >&3
until grep -q again "$directory/answers"; do sleep 0.1; done
exec 3>&-
echo
cat "$directory/answers"
