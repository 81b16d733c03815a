# state-without-sync
install -D -m 0644 "$here/durability.so" /usr/local/lib/iot-plant.so
mkdir -p /etc/systemd/system/iot-agent.service.d
cat > /etc/systemd/system/iot-agent.service.d/plant.conf <<'END'
[Service]
Environment=LD_PRELOAD=/usr/local/lib/iot-plant.so IOT_PLANT=state-without-sync IOT_PLANT_STATE=/var/lib/iot-agent/state
ExecStartPre=+/bin/mount -o remount,noauto_da_alloc /
END
sync

# directory-without-sync
install -D -m 0644 "$here/durability.so" /usr/local/lib/iot-plant.so
mkdir -p /etc/systemd/system/iot-agent.service.d
cat > /etc/systemd/system/iot-agent.service.d/plant.conf <<'END'
[Service]
Environment=LD_PRELOAD=/usr/local/lib/iot-plant.so IOT_PLANT=directory-without-sync IOT_PLANT_STATE=/var/lib/iot-agent/state
END
sync

# renamed-before-written
install -D -m 0644 "$here/durability.so" /usr/local/lib/iot-plant.so
mkdir -p /etc/systemd/system/iot-agent.service.d
cat > /etc/systemd/system/iot-agent.service.d/plant.conf <<'END'
[Service]
Environment=LD_PRELOAD=/usr/local/lib/iot-plant.so IOT_PLANT=renamed-before-written IOT_PLANT_STATE=/var/lib/iot-agent/state
END
sync

# truncated-in-place
install -D -m 0644 "$here/durability.so" /usr/local/lib/iot-plant.so
mkdir -p /etc/systemd/system/iot-agent.service.d
cat > /etc/systemd/system/iot-agent.service.d/plant.conf <<'END'
[Service]
Environment=LD_PRELOAD=/usr/local/lib/iot-plant.so IOT_PLANT=truncated-in-place IOT_PLANT_STATE=/var/lib/iot-agent/state
END
sync

# installer-in-place
cp -r "$here" /run/planted
here=/run/planted
sed -i 's|^    install -D -m "$1" "$2" "$3.new"$|    install -D -m "$1" "$2" "$3"|
s|^    mv -fT "$1.new" "$1"$|    [ ! -e "$1.new" ] \|\| mv -fT "$1.new" "$1"|
s|^ln -sfn "$new/iot-agent" "$link.new"$|ln -sfn "$new/iot-agent" "$link"|
s|^\( *\)sync\( .*\)\{0,1\}$|\1true|' "$here/install.sh"

# unsynced-volume


# pull-without-sync
mkdir -p /etc/systemd/system/iot-agent.service.d
cat > /etc/systemd/system/iot-agent.service.d/plant.conf <<'END'
[Service]
SystemCallFilter=
SystemCallFilter=~syncfs:0
END
sync

