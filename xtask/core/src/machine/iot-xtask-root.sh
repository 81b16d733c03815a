# Runs the commands that the smoke sends to a virtio-serial port. A request is one line: a word, the limit of
# the command in seconds, and the command. The answer is the output of the command between the lines "begin WORD" and
# "end WORD".
port=/dev/virtio-ports/iot-xtask.root
until [ -c $port ]; do sleep 0.2; done
exec 3<> $port
while true; do
    # read fails while no process of the host is connected to the port.
    if read -r -u 3 word limit command; then
        echo "begin $word" >&3
        timeout --kill-after=1 "$limit" bash -c "$command" < /dev/null >&3 2> /dev/null
        echo "end $word" >&3
    else
        sleep 1
    fi
done
