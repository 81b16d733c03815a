//! Tests `preflight --fix` on a host that lacks one program. Scripts take the place of the package manager and of
//! systemd.

use crate::broken_hosts::Host;
use crate::scratch::{assert_code, message};

/// Makes a host with systemd that lacks mtools. Its `apt-get` can install this package, but one of its sources is dead.
/// The new package enables a unit, and another process enables one at the same time.
fn host(systemctl: &str) -> Host {
    let host = Host::new();
    host.program(
        "apt-get",
        "#!/bin/sh\ncase \"$*\" in
        update) exit 100 ;;
        '--simulate install '*) echo 'Inst mtools (4.0.33 Debian:12 [amd64])' ;;
        *) umount /usr/bin/mtools && touch $S/installed ;;
        esac\n",
    );
    host.program("systemctl", &format!("#!/bin/sh\n{systemctl}\n"));
    host.program(
        "dpkg-query",
        "#!/bin/sh\ncase $2 in
        */own.service) echo 'mtools: /lib/systemd/system/own.service' ;;
        *) echo 'others: /lib/systemd/system/other.service' ;;
        esac\n",
    );
    let path = format!("{}:{}", host.scratch.path().display(), std::env::var("PATH").unwrap());
    host.after(
        "mount -t tmpfs tmpfs /run; mkdir -p /run/systemd/system; mount --bind /dev/null /usr/bin/mtools",
    )
    .with("PATH", path)
    .asked(&["--arch", "aarch64", "--fix", "--yes"])
}

#[test]
fn a_dead_source_ends_nothing_and_the_units_of_others_stay_enabled() {
    let host = host(
        "if [ \"$1\" = disable ]; then echo \"$*\" > $S/disabled; exit; fi
        echo 'ssh.service enabled enabled'
        [ ! -e $S/installed ] || printf '%s enabled enabled\\n' own.service other.service",
    );
    let output = host.command().output().unwrap();
    assert_code(&output, 0);
    let message = message(&output);
    assert!(message.contains("warning: apt-get update: exit status: 100"), "{message}");
    let disabled = std::fs::read_to_string(host.file("disabled")).unwrap();
    assert_eq!(disabled, "disable --now own.service\n", "{message}");
}

#[test]
fn a_systemd_that_does_not_answer_is_the_hosts_fault() {
    let output = host("echo broken >&2; exit 1").command().output().unwrap();
    assert_code(&output, 69);
    assert!(message(&output).contains("broken"), "{}", message(&output));
}
