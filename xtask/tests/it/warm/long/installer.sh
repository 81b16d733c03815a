# Tests agent/dist/install.sh and uninstall.sh in a guest. It runs as root in the directory of the bundle, which has no
# configuration and no secrets yet. Each line of `expect` is one claim; the first that does not hold ends the script.
set -eu
etc=/etc/iot-agent
lib=/usr/local/lib/iot-agent
agent=/usr/local/bin/iot-agent

expect() {
    what=$1
    shift
    if ! "$@"; then
        echo "not so: $what ($*)"
        cat install.log
        exit 1
    fi
}

# Writes a configuration with the login $1 and its keys $2.
configure() {
    cat > config.toml <<END
[agent]
device_id = "dev-1"
[credentials]
type = "$1"
$2
[nats]
urls = ["tls://127.0.0.1:9"]
ca_file = "secrets/ca.pem"
certificate_file = "secrets/device.pem"
key_file = "secrets/device.key"
END
}

install_bundle() {
    sh ./install.sh > install.log 2>&1
}

# The agent has tried to connect to the bus with its login, so it could read all of its files.
has_tried_to_connect() {
    since=$(systemctl show --property ExecMainStartTimestamp --value iot-agent.service)
    for _ in $(seq 100); do
        if journalctl --quiet --unit iot-agent.service --since "${since#* }" | grep -q 'cannot connect to the bus'; then
            return
        fi
        sleep 0.1
    done
    return 1
}

is_running() {
    grep -q '^State:[[:space:]]*[RSD]' "/proc/$installer/status"
}

was_killed() {
    ! wait "$installer" 2> said
}

pid() {
    systemctl show --property MainPID --value iot-agent.service
}

mkdir secrets
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=dev-1 -days 9 \
    -keyout secrets/device.key -out secrets/device.pem 2> /dev/null
cp secrets/device.pem secrets/ca.pem
echo s3cret > secrets/word

# Each kind of login, in the directory that agent/README.md names.
configure user-password 'username = "dev-1"
password_file = "secrets/word"'
expect 'the installer succeeds' install_bundle
expect 'the agent reads its secrets' has_tried_to_connect
first=$(readlink "$agent")
configure token 'token_file = "secrets/word"'
expect 'the installer replaces a configuration' install_bundle
expect 'the agent reads its secrets' has_tried_to_connect
expect 'the service user cannot write the configuration' \
    sh -c "! runuser -u iot-agent -- sh -c 'echo >> $etc/config.toml' 2> /dev/null"
expect 'others cannot read the configuration' sh -c "! runuser -u nobody -- cat $etc/config.toml 2> /dev/null"

# A secret can be replaced while the agent runs. Root notices if the service cannot read it.
chmod 0600 "$etc/secrets/word"
expect 'check-config looks as the service user' sh -c "! $agent check-config $etc/config.toml 2> said"
expect 'check-config names the reason' grep -q 'Permission denied' said
chmod 0640 "$etc/secrets/word"
expect 'check-config accepts the file' sh -c "$agent check-config $etc/config.toml > said"

# A configuration that is not valid replaces nothing.
running=$(pid)
cp config.toml good.toml
configure token 'tokn_file = "secrets/word"'
printf x >> iot-agent
expect 'the installer refuses a configuration' sh -c '! sh ./install.sh > install.log 2>&1'
expect 'the installer names the key' grep -q tokn_file install.log
expect 'the configuration is the old one' cmp -s good.toml "$etc/config.toml"
expect 'the executable is the old one' [ "$(readlink "$agent")" = "$first" ]
expect 'the agent still runs' [ "$(pid)" = "$running" ]

# The same executable may be installed again.
cp good.toml config.toml
cp "$first" iot-agent
expect 'the installer changes nothing' install_bundle
printf x >> iot-agent

# An upgrade without a configuration keeps that of the device, and the executable before.
rm config.toml
expect 'the installer upgrades' install_bundle
expect 'the link leads to the new executable' cmp -s iot-agent "$agent"
expect 'the old executable stays' [ -x "$first" ]
printf x >> iot-agent
expect 'the installer upgrades again' install_bundle
expect 'the oldest executable is gone' [ ! -e "$first" ]
expect 'two executables are left' [ "$(find "$lib/versions" -name iot-agent | wc -l)" = 2 ]

# An upgrade that is interrupted leaves a complete agent and a valid configuration.
cp good.toml config.toml
for path in "$etc/staged/config.toml" "$lib/uninstall.sh.new" "$agent.new"; do
    printf x >> iot-agent
    sh ./install.sh > install.log 2>&1 &
    installer=$!
    until [ -e "$path" ] || [ -L "$path" ]; do
        expect "the installer writes $path" is_running
    done
    kill -KILL "$installer"
    expect "the installer is interrupted at $path" was_killed
    expect "there is an agent after $path" sh -c "$agent check-config $etc/config.toml > said"
done
expect 'the installer goes on after an interruption' install_bundle
expect 'nothing is staged' [ ! -e "$etc/staged" ]
expect 'the link leads to the new executable' cmp -s iot-agent "$agent"
expect 'two executables are left' [ "$(find "$lib/versions" -name iot-agent | wc -l)" = 2 ]

# The uninstaller leaves the state, and with --purge nothing.
expect 'the uninstaller refuses an unknown argument' sh -c "! sh $lib/uninstall.sh --all 2> said"
expect 'the uninstaller succeeds' sh ./uninstall.sh
expect 'no executable is left' [ ! -e "$agent" ]
expect 'no unit is left' sh -c '! systemctl cat iot-agent.service > said 2>&1'
expect 'the state is left' [ -d /var/lib/iot-agent ]
expect 'the configuration is left' [ -e "$etc/config.toml" ]
expect 'the uninstaller succeeds again' sh ./uninstall.sh
expect 'the installer succeeds again' install_bundle
expect 'the agent runs' systemctl is-active --quiet iot-agent.service
expect 'the uninstaller purges' sh ./uninstall.sh --purge
expect 'no user is left' sh -c '! id iot-agent > said 2>&1'
# The directory of the prerequisites belongs to the machine, and is gone at the next boot.
find /etc /usr/local /var/lib /run -xdev -name '*iot-agent*' -not -path '/run/iot-prerequisites/*' > left 2> said
expect 'no file is left' cmp left /dev/null
echo 'all of it holds'
