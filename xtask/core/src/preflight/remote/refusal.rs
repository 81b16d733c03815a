//! The reasons why a libvirt could not be queried. A table of known error messages, which is searched in order, has the
//! finding for each reason.

use std::time::Duration;

use crate::libvirt_uri::ConnectUri;
use crate::preflight::findings::Finding;

/// The reason why a libvirt could not be queried.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// libvirt returned an error with this message. The message is in English, because this process sets no locale.
    Message(String),
    /// libvirt did not answer within the limit.
    Silent {
        /// The request that was not answered: `open the connection`.
        asked: &'static str,
        limit: Duration,
    },
}

/// The id of the finding about missing permissions.
pub(super) const PERMISSION: &str = "connect-permission";

/// An entry of the table: it recognises an error message, and has the finding for it.
struct Known {
    /// The transport to which this entry applies; `None` for all transports.
    transport: Option<&'static str>,
    /// True if this entry applies only to the daemon of a user (a session).
    session: bool,
    /// The entry applies if the message contains all of these texts.
    words: &'static [&'static str],
    id: &'static str,
    /// The sentence of the finding, without the URI and the colon with which it begins.
    what: &'static str,
    /// The template of the remedy, which [`remedy`] fills in.
    remedy: &'static str,
}

const ANY: Known = Known {
    transport: None,
    session: false,
    words: &[],
    id: "connect-daemon",
    what: "libvirt cannot connect",
    remedy: "{virsh}",
};
const SSH: Known = Known { transport: Some("ssh"), id: "connect-ssh", ..ANY };
const NO_TUNNEL: Known =
    Known { what: "ssh did not reach the host's libvirt", remedy: "check that this works: {ssh}", ..SSH };
const DENIED: Known = Known { id: PERMISSION, remedy: "{let_in}", ..ANY };
const HUNG_UP: Known = Known {
    what: "it accepted the connection and closed it",
    remedy: "{there}read its journal: journalctl --unit libvirtd --unit virtqemud",
    ..ANY
};
const START: &str = "{there}sudo systemctl enable --now libvirtd.socket (virtqemud.socket if libvirt's daemons are \
                     separate); if there is no such unit, install libvirt first (Debian: libvirt-daemon-system)";

const KNOWN: &[Known] = &[
    Known {
        words: &["Host key verification failed"],
        what: "ssh does not know this host's key",
        remedy: "log in once by hand and compare the fingerprint: {ssh}",
        ..SSH
    },
    Known {
        words: &["Permission denied ("],
        what: "the host's sshd does not accept this user without a password",
        remedy: "ssh-copy-id {login}, or load the key: ssh-add",
        ..SSH
    },
    Known {
        words: &["ssh: Could not resolve hostname"],
        what: "no host has this name",
        remedy: "check the name: getent hosts {host}",
        ..SSH
    },
    Known {
        words: &["ssh: connect to host"],
        what: "no sshd answers on that host",
        remedy: "check that the host is up and sshd listens: {ssh}",
        ..SSH
    },
    Known {
        words: &["nc: not found"],
        what: "the host has neither virt-ssh-helper nor nc; ssh needs one of them to reach libvirt",
        remedy: "{there}install libvirt (Debian: libvirt-daemon-system)",
        ..ANY
    },
    Known {
        words: &["ssh", "Cannot find"],
        what: "ssh is not installed on this machine",
        remedy: "install openssh-client",
        ..SSH
    },
    Known { words: &["ermission denied"], what: "this user may not open its socket", ..DENIED },
    Known { words: &["authenti"], what: "it requires an interactive authentication", ..DENIED },
    Known { words: &["olkit"], what: "polkit does not allow it", ..DENIED },
    Known { words: &["ccess denied"], what: "this user may not use it", ..DENIED },
    Known {
        words: &["No such file or directory"],
        session: true,
        what: "this user has no running daemon, and none could be started",
        remedy: "{there}install the daemon (Debian: libvirt-daemon), which libvirt then starts by itself",
        ..ANY
    },
    Known {
        words: &["certificate"],
        id: "connect-tls",
        what: "the TLS certificates are missing or invalid",
        remedy: "see libvirt.org/kbase/tlscerts.html; or connect by ssh: qemu+ssh://{login}/system",
        ..ANY
    },
    Known {
        words: &["No such file or directory"],
        what: "no daemon runs there: its socket is missing",
        remedy: START,
        ..ANY
    },
    Known {
        words: &["Connection refused"],
        what: "nothing listens: the daemon has ended, or its port is closed",
        remedy: START,
        ..ANY
    },
    // If ssh fails, libvirt's message ends with `Connection reset by peer`.
    Known { words: &["Cannot recv data: ", ": Connection reset by peer"], ..NO_TUNNEL },
    // ssh ended before libvirt had written to it. ssh's own message is then lost.
    Known { words: &["Cannot write data: Broken pipe"], ..NO_TUNNEL },
    Known { words: &["End of file while reading"], ..HUNG_UP },
    Known { words: &["Broken pipe"], ..HUNG_UP },
    Known { words: &["Connection reset by peer"], ..HUNG_UP },
    Known {
        words: &["no connection driver available"],
        id: "connect-driver",
        what: "the daemon has no QEMU driver",
        remedy: "{there}install it (Debian: libvirt-daemon-driver-qemu) and restart the daemon",
        ..ANY
    },
];

impl Refusal {
    /// Returns whether a daemon answers but does not give this user permission.
    pub fn is_permission(&self, uri: &ConnectUri) -> bool {
        self.finding(uri).id == PERMISSION
    }

    /// Returns the finding for this reason.
    pub fn finding(&self, uri: &ConnectUri) -> Finding {
        let (id, what, evidence, remedy) = match self {
            Self::Silent { asked, limit } => (
                "connect-silent",
                format!("did not answer within {} s", limit.as_secs()),
                format!("request: {asked}"),
                format!("check whether the host is up and its daemon hangs: {}", uri.virsh("version")),
            ),
            Self::Message(words) => {
                let known = KNOWN.iter().find(|known| known.matches(uri, words)).unwrap_or(&ANY);
                (known.id, known.what.to_owned(), words.clone(), remedy(known.remedy, uri))
            }
        };
        Finding::blocks(id, format!("{uri}: {what}"), evidence, remedy)
    }
}

impl Known {
    fn matches(&self, uri: &ConnectUri, message: &str) -> bool {
        self.transport.is_none_or(|transport| transport == uri.transport)
            && (!self.session || uri.session)
            && self.words.iter().all(|word| message.contains(word))
    }
}

/// Returns the remedy for a user without permission or with read-only access.
pub(super) fn let_in(uri: &ConnectUri) -> String {
    if uri.socket.as_ref().is_some_and(|path| path.ends_with("-ro")) {
        return "this socket is read-only: use the one without -ro".to_owned();
    }
    let own = if uri.destination.is_none() && !uri.session {
        "; or use this user's own libvirt: qemu:///session"
    } else {
        ""
    };
    format!(
        "{}sudo usermod --append --groups libvirt \"$USER\" (or the group of its socket) and log in again; or allow \
         org.libvirt.unix.manage by a polkit rule{own}",
        uri.there()
    )
}

/// Replaces the placeholders in the template of a remedy.
fn remedy(template: &str, uri: &ConnectUri) -> String {
    let login = uri.destination.as_deref().unwrap_or("localhost");
    template
        .replace("{there}", &uri.there())
        .replace("{ssh}", &format!("ssh {login} true"))
        .replace("{login}", login)
        .replace("{host}", login.rsplit('@').next().unwrap_or_default())
        .replace("{virsh}", &uri.virsh("version"))
        .replace("{let_in}", &let_in(uri))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::preflight::findings::{Remedy, Severity};

    /// The messages were copied from libvirt 9.0 and OpenSSH 9.2.
    #[expect(clippy::too_many_lines, reason = "a table with a row for each refusal")]
    #[test]
    fn each_refusal_is_told_apart() {
        const SYSTEM: &str = "qemu:///system";
        const FAR: &str = "qemu+ssh://me@far/system";
        for (uri, message, id, remedy) in [
            (
                SYSTEM,
                "Failed to connect socket to '/var/run/libvirt/libvirt-sock': No such file or directory",
                "connect-daemon",
                "systemctl enable --now libvirtd.socket",
            ),
            (
                SYSTEM,
                "Failed to connect socket to '/var/run/libvirt/libvirt-sock': Connection refused",
                "connect-daemon",
                "systemctl",
            ),
            (
                SYSTEM,
                "Failed to connect socket to '/var/run/libvirt/libvirt-sock': Permission denied",
                "connect-permission",
                "--groups libvirt",
            ),
            (
                SYSTEM,
                "authentication unavailable: no polkit agent available to authenticate action 'org.libvirt.unix.manage'",
                "connect-permission",
                "org.libvirt.unix.manage",
            ),
            (
                SYSTEM,
                "authentication failed: access denied by policy",
                "connect-permission",
                "qemu:///session",
            ),
            (
                "qemu:///session",
                "Cannot find 'libvirtd' in path: No such file or directory",
                "connect-daemon",
                "install the daemon",
            ),
            (
                SYSTEM,
                "no connection driver available for qemu:///system",
                "connect-driver",
                "libvirt-daemon-driver-qemu",
            ),
            (SYSTEM, "End of file while reading data: Input/output error", "connect-daemon", "journalctl"),
            (SYSTEM, "Cannot write data: Broken pipe", "connect-daemon", "journalctl"),
            (SYSTEM, "Cannot recv data: Connection reset by peer", "connect-daemon", "journalctl"),
            (
                FAR,
                "Cannot recv data: kex_exchange: odd: Connection reset by peer",
                "connect-ssh",
                "ssh me@far true",
            ),
            (SYSTEM, "something new", "connect-daemon", "virsh --connect 'qemu:///system' version"),
            (
                FAR,
                "Cannot recv data: ssh: Could not resolve hostname far: Name or service not known: Connection reset by peer",
                "connect-ssh",
                "getent hosts far",
            ),
            (
                FAR,
                "Cannot recv data: ssh: connect to host far port 22: Connection refused: Connection reset by peer",
                "connect-ssh",
                "ssh me@far true",
            ),
            (
                FAR,
                "Cannot recv data: Host key verification failed.: Connection reset by peer",
                "connect-ssh",
                "fingerprint",
            ),
            (
                FAR,
                "Cannot recv data: me@far: Permission denied (publickey,password).: Connection reset by peer",
                "connect-ssh",
                "ssh-copy-id me@far",
            ),
            (
                FAR,
                "Cannot recv data: sh: 1: nc: not found: Connection reset by peer",
                "connect-daemon",
                "on me@far: install",
            ),
            (
                FAR,
                "Cannot recv data: virt-ssh-helper: cannot connect to '/var/run/libvirt/libvirt-sock': Failed to connect \
                 socket to '/var/run/libvirt/libvirt-sock': No such file or directory: Connection reset by peer",
                "connect-daemon",
                "on me@far: sudo systemctl",
            ),
            (
                FAR,
                "Cannot recv data: virt-ssh-helper: cannot connect to '/var/run/libvirt/libvirt-sock': Failed to connect \
                 socket to '/var/run/libvirt/libvirt-sock': Permission denied: Connection reset by peer",
                "connect-permission",
                "on me@far: sudo usermod",
            ),
            (
                "qemu+tls://far/system",
                "Cannot read CA certificate '/etc/pki/CA/cacert.pem': No such file or directory",
                "connect-tls",
                "qemu+ssh://far/system",
            ),
            (
                "qemu+tcp://127.0.0.1:9/system",
                "unable to connect to server at '127.0.0.1:9': Connection refused",
                "connect-daemon",
                "on 127.0.0.1: ",
            ),
            (
                "qemu+unix:///system?socket=/run/libvirt/libvirt-sock-ro",
                "Failed to connect socket to '/run/libvirt/libvirt-sock-ro': Permission denied",
                "connect-permission",
                "without -ro",
            ),
        ] {
            let finding = Refusal::Message(message.to_owned()).finding(&uri.parse().unwrap());
            assert_eq!((finding.id, finding.severity), (id, Severity::Blocks), "{message}");
            assert_eq!(finding.evidence, message);
            assert!(finding.sentence.starts_with(uri), "{}", finding.sentence);
            let Some(Remedy::Manual(described)) = finding.remedy else {
                panic!("{message}: nothing that --fix would run")
            };
            assert!(described.contains(remedy), "{message}: {described}");
        }
    }

    #[test]
    fn silence_names_the_question_and_the_limit() {
        let refusal = Refusal::Silent { asked: "open the connection", limit: crate::limits::CONNECTION };
        let finding = refusal.finding(&"qemu+ssh://far/system".parse().unwrap());
        assert_eq!(finding.id, "connect-silent");
        assert!(finding.sentence.ends_with(" s") && finding.evidence == "request: open the connection");
    }
}
