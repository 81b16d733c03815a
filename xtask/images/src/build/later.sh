# mmdebstrap's extract hook runs this with the new tree as $1, in which no package is configured. Maintainer scripts
# call some tools whose results they never read. A script replaces each of these tools. It starts a job, which runs the
# tool, and ends at once. The jobs run beside the maintainer scripts on another processor, one job at a time. The tool
# itself is beside the script, under the name that dpkg's diversion gives. finish.sh waits for the jobs and puts the
# tools back.
#
# The results do not depend on the time of the job: compiled Python contains the time and the size of its source, and
# the bundle of certificates is sorted.
set -eu
root=$1
later=$root/.later
mkdir -p "$later/jobs" "$root/etc/ssh"
for tool in usr/bin/py3compile usr/sbin/update-ca-certificates; do
    echo "$tool" >> "$later/list"
    printf '/%s\n/%s.later\n:\n' "$tool" "$tool" >> "$root/var/lib/dpkg/diversions"
    # A job's file is locked while the job runs, and empty until the job has succeeded.
    cat > "$root/$tool" <<'END'
#!/bin/sh
exec 8> "$(mktemp "/.later/jobs/${0##*/}.XXXXXX")"
flock 8
# debconf and dpkg read the output of scripts until all processes have closed it, so the job must not keep it open.
(
    flock 9
    if "$0.later" "$@"; then echo done >&8; fi
) < /dev/null >> /.later/log 2>&1 3>&- 4>&- 5>&- 6>&- 7>&- 9>> /.later/lock &
END
    chmod 755 "$root/$tool"
done

# The package of the ssh server makes no key if a key exists. customize.sh deletes these empty files. Each device makes
# its own keys.
for kind in rsa ecdsa ed25519; do : > "$root/etc/ssh/ssh_host_${kind}_key"; done
