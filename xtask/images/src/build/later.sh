# Runs by mmdebstrap's extract hook with the new tree as $1: none of its packages is configured. What maintainer scripts have made
# and never look at is made beside them, on another processor, one thing at a time: a script in the place of the tool leaves
# the work to a job and ends. The tool itself is beside it, under the name that dpkg's diversion gives. finish.sh waits for
# the jobs and puts the tools back.
#
# Compiled Python tells the source's time and size, and the bundle of certificates lists them sorted: the same whenever made.
set -eu
root=$1
later=$root/.later
mkdir -p "$later/jobs" "$root/etc/ssh"
for tool in usr/bin/py3compile usr/sbin/update-ca-certificates; do
    echo "$tool" >> "$later/list"
    printf '/%s\n/%s.later\n:\n' "$tool" "$tool" >> "$root/var/lib/dpkg/diversions"
    # A job's file is locked as long as it runs, and empty until it is done.
    cat > "$root/$tool" <<'END'
#!/bin/sh
exec 8> "$(mktemp "/.later/jobs/${0##*/}.XXXXXX")"
flock 8
# debconf and dpkg read other scripts' outputs to their ends.
(
    flock 9
    if "$0.later" "$@"; then echo done >&8; fi
) < /dev/null >> /.later/log 2>&1 3>&- 4>&- 5>&- 6>&- 7>&- 9>> /.later/lock &
END
    chmod 755 "$root/$tool"
done

# The server's package makes no key where there is one, and customize.sh deletes them: each device makes its own.
for kind in rsa ecdsa ed25519; do : > "$root/etc/ssh/ssh_host_${kind}_key"; done
