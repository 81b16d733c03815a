//! The libvirt URI of `--connect` and `--host` (libvirt.org/uri.html). It is checked before anything slow starts.

use std::fmt;
use std::str::FromStr;

use crate::error::Failure;

/// The transports of libvirt's remote driver.
const TRANSPORTS: &[&str] = &["unix", "ssh", "libssh", "libssh2", "tcp", "tls", "ext"];
/// The transports that connect to another host, which the URI must name.
const TO_A_HOST: &[&str] = &["ssh", "libssh", "libssh2", "tcp", "tls"];

/// The error for a URI whose part after `?` cannot be parsed.
const PARAMETERS: &str = "the part after ? must be NAME=VALUE&…";

/// A checked libvirt URI.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectUri {
    text: String,
    /// The transport. If the URI names neither a host nor a transport, the transport is `unix`. If it names only a
    /// host, the transport is `tls`.
    pub transport: String,
    /// The host in ssh's notation, with the user if the URI names one; `None` for this host.
    pub destination: Option<String>,
    /// True if the URI names the daemon of a user (a session) and not the system's daemon.
    pub session: bool,
    /// True if the URI names libvirt's mock driver, which has no daemon.
    pub mock: bool,
    /// The path of the socket, if the URI names one.
    pub socket: Option<String>,
    /// The client for the transport `ssh`, with the URI's port and parameters.
    ssh: Option<Ssh>,
}

/// The ssh client of a URI (libvirt.org/uri.html, "ssh transport").
#[derive(Debug, Clone, PartialEq, Eq)]
struct Ssh {
    program: String,
    arguments: Vec<String>,
}

impl ConnectUri {
    /// Returns the URI to pass to libvirt. With the transport ssh, a parameter is added that forbids ssh to ask for a
    /// password or a fingerprint, because possibly no user is there to answer.
    pub fn for_libvirt(&self) -> String {
        if self.transport != "ssh" || self.text.contains("no_tty=") {
            return self.text.clone();
        }
        let separator = if self.text.contains('?') { '&' } else { '?' };
        format!("{}{separator}no_tty=1", self.text)
    }

    /// Returns the program and the arguments of an ssh client that logs in to the daemon's host. `None` if the URI does
    /// not name a host by the transport ssh. A command for that host can be appended.
    pub fn ssh(&self) -> Option<(&str, Vec<String>)> {
        let Ssh { program, arguments } = self.ssh.as_ref()?;
        let destination = self.destination.clone()?;
        Some((program, [arguments.clone(), vec![destination]].concat()))
    }

    /// Returns ssh's option `ProxyCommand` (ssh_config(5)) for a connection to a guest of the daemon's host.
    pub fn proxy_command(&self) -> Option<String> {
        let Ssh { program, arguments } = self.ssh.as_ref()?;
        let destination = self.destination.as_ref()?;
        // ssh passes the command to the user's shell after the word exec, and replaces words with a percent sign.
        let quoted = |word: &String| format!("'{}'", word.replace('\'', "'\\''").replace('%', "%%"));
        let words: Vec<_> = std::iter::once(program).chain(arguments).map(quoted).collect();
        Some(format!("{} -W %h:%p {}", words.join(" "), quoted(destination)))
    }

    /// Returns a virsh command for this libvirt. The command can be pasted into a shell.
    pub fn virsh(&self, arguments: &str) -> String {
        format!("virsh --connect '{}' {arguments}", self.text)
    }

    /// Returns `on HOST: `, or an empty text for this host.
    pub fn there(&self) -> String {
        self.destination.as_ref().map_or(String::new(), |host| format!("on {host}: "))
    }
}

impl fmt::Display for ConnectUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for ConnectUri {
    type Err = Failure;

    fn from_str(text: &str) -> Result<Self, Failure> {
        let no = |why: &str| {
            Failure::usage(format!(
                "{why}; libvirt's URIs look like qemu:///system, qemu:///session, qemu+ssh://HOST/system"
            ))
        };
        // [`ConnectUri::virsh`] writes the URI in single quotes, so the URI must not contain one.
        if text.contains(|c: char| c.is_whitespace() || c.is_control() || matches!(c, '\'' | '#')) {
            return Err(no("a URI has no space, quote, control character or fragment"));
        }
        percent_decoded(text).ok_or_else(|| no("a % must be followed by two hexadecimal digits"))?;
        let (scheme, rest) = text.split_once("://").ok_or_else(|| no("this is not SCHEME://…"))?;
        let (driver, named) =
            scheme.split_once('+').map_or((scheme, None), |(driver, rest)| (driver, Some(rest)));
        let mock = match driver {
            "qemu" => false,
            "test" => true,
            _ => return Err(no(&format!("{driver:?} is not a driver of QEMU guests"))),
        };
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = rest.split_once('/').ok_or_else(|| no("there is no path after the host"))?;
        let host =
            host_of(authority).ok_or_else(|| no(&format!("{authority:?} is not [USER@]HOST[:PORT]")))?;
        let transport = named.unwrap_or(if authority.is_empty() { "unix" } else { "tls" });
        if !TRANSPORTS.contains(&transport) {
            return Err(no(&format!("{transport:?} is not one of the transports {}", TRANSPORTS.join(", "))));
        }
        match (TO_A_HOST.contains(&transport), host.is_some()) {
            (true, false) => return Err(no(&format!("the transport {transport} needs a host"))),
            (false, true) => return Err(no(&format!("the transport {transport} takes no host"))),
            _ => {}
        }
        match path {
            "embed" => {
                return Err(Failure::usage(
                    "the embedded driver belongs to cargo xtask itself: use --rehearse",
                ));
            }
            "system" | "session" => {}
            _ if mock && !path.is_empty() => {}
            _ => return Err(no(&format!("QEMU's driver has /system and /session, not {path:?}"))),
        }
        let ssh = match transport {
            "ssh" => Some(ssh_client(authority, query).map_err(|()| no(PARAMETERS))?),
            _ => None,
        };
        Ok(Self {
            ssh,
            text: text.to_owned(),
            transport: transport.to_owned(),
            destination: host,
            session: path == "session",
            mock,
            socket: parameter(query, "socket").map_err(|()| no(PARAMETERS))?,
        })
    }
}

/// Returns the host with its user and without the port. The outer `None` means that the authority is not valid.
fn host_of(authority: &str) -> Option<Option<String>> {
    if authority.is_empty() {
        return Some(None);
    }
    let (user, place) =
        authority.rsplit_once('@').map_or((None, authority), |(user, rest)| (Some(user), rest));
    let (host, port) = match place.strip_prefix('[').and_then(|inner| inner.split_once(']')) {
        Some((address, port)) => (address, port.strip_prefix(':').or(port.is_empty().then_some("0"))?),
        None => place.split_once(':').unwrap_or((place, "0")),
    };
    // libvirt accepts no password in a URI. ssh would read a user or host that begins with a dash as an option.
    let plain = |word: &str| !word.is_empty() && !word.starts_with('-');
    let sound = plain(host)
        && user.is_none_or(|user| plain(user) && !user.contains(':'))
        && port.parse::<u16>().is_ok();
    sound.then(|| Some(user.map_or(host.to_owned(), |user| format!("{user}@{host}"))))
}

/// Returns the ssh client for an authority that [`host_of`] has accepted, with the parameters of the URI.
fn ssh_client(authority: &str, query: &str) -> Result<Ssh, ()> {
    let mut arguments = vec!["-oBatchMode=yes".to_owned()];
    arguments.extend(port_of(authority).map(|port| format!("-p{port}")));
    arguments.extend(parameter(query, "keyfile")?.map(|path| format!("-i{path}")));
    if parameter(query, "no_verify")?.is_some_and(|value| value != "0") {
        arguments.push("-oStrictHostKeyChecking=no".to_owned());
    }
    Ok(Ssh { program: parameter(query, "command")?.unwrap_or_else(|| "ssh".to_owned()), arguments })
}

/// Returns the port of an authority that [`host_of`] has accepted.
fn port_of(authority: &str) -> Option<u16> {
    let place = authority.rsplit_once('@').map_or(authority, |(_, place)| place);
    let after = place.rsplit_once(']').map_or(place, |(_, rest)| rest);
    after.rsplit_once(':')?.1.parse().ok()
}

fn parameter(query: &str, name: &str) -> Result<Option<String>, ()> {
    let mut found = None;
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').ok_or(())?;
        if key == name {
            found = percent_decoded(value);
        }
    }
    Ok(found)
}

fn percent_decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let digits = [rest.next()?, rest.next()?];
            let digits = str::from_utf8(&digits).ok().filter(|digits| !digits.starts_with('+'))?;
            bytes.push(u8::from_str_radix(digits, 16).ok()?);
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_says_how_and_where() {
        for (text, transport, destination, session) in [
            ("qemu:///system", "unix", None, false),
            ("qemu:///session", "unix", None, true),
            ("qemu+unix:///system?socket=/a%20b/s", "unix", None, false),
            ("qemu+ssh://host/system", "ssh", Some("host"), false),
            ("qemu+ssh://me@host:2222/session", "ssh", Some("me@host"), true),
            ("qemu+ssh://me@[fe80::1]:22/system", "ssh", Some("me@fe80::1"), false),
            ("qemu://host/system", "tls", Some("host"), false),
            ("qemu+tcp://127.0.0.1:16509/system", "tcp", Some("127.0.0.1"), false),
            ("test:///default", "unix", None, false),
        ] {
            let uri: ConnectUri = text.parse().unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!(
                (uri.transport.as_str(), uri.destination.as_deref()),
                (transport, destination),
                "{text}"
            );
            assert_eq!((uri.session, uri.mock), (session, text.starts_with("test")), "{text}");
            assert_eq!(uri.to_string(), text);
        }
        let uri: ConnectUri = "qemu+unix:///system?x=1&socket=/a%20b/s".parse().unwrap();
        assert_eq!(uri.socket.as_deref(), Some("/a b/s"));
    }

    #[test]
    fn what_cannot_be_a_libvirt_is_refused_with_its_reason() {
        for (text, reason) in [
            ("", "SCHEME"),
            ("default", "SCHEME"),
            ("qemu:/system", "SCHEME"),
            ("qemu://", "no path"),
            ("qemu+ssh://host", "no path"),
            ("qemu:///", "/system and /session"),
            ("qemu:///nonsense", "nonsense"),
            ("qemu:///embed?root=/x", "--rehearse"),
            ("xen:///system", "not a driver of QEMU"),
            ("http://host/system", "not a driver of QEMU"),
            ("qemu+pigeon://host/system", "pigeon"),
            ("qemu+ssh:///system", "needs a host"),
            ("qemu+unix://host/system", "takes no host"),
            ("qemu+ssh://host:99999/system", "HOST"),
            ("qemu+ssh://me:secret@host/system", "HOST"),
            ("qemu+ssh://-oProxyCommand=x/system", "HOST"),
            ("qemu+ssh://[::1/system", "HOST"),
            ("qemu:///system?socket", "NAME=VALUE"),
            ("qemu:///system?socket=%zz", "hexadecimal"),
            ("qemu:///sys tem", "space"),
            ("qemu:///system?socket=/a'b", "quote"),
        ] {
            let error = text.parse::<ConnectUri>().unwrap_err().to_string();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }

    #[test]
    fn the_ssh_client_of_a_uri_has_its_port_and_parameters() {
        let uri = |text: &str| text.parse::<ConnectUri>().unwrap();
        assert_eq!(uri("qemu:///system").ssh(), None);
        let plain = uri("qemu+ssh://me@host/system");
        assert_eq!(plain.ssh(), Some(("ssh", vec!["-oBatchMode=yes".to_owned(), "me@host".to_owned()])));
        let text = "qemu+ssh://me@[fe80::1]:2222/system?keyfile=/k%20%25/id's&command=/opt/ssh&no_verify=1";
        // A single quote cannot stand in a URI, but percent-encoded it can.
        let uri = uri(&text.replace('\'', "%27"));
        assert_eq!(
            uri.proxy_command().unwrap(),
            "'/opt/ssh' '-oBatchMode=yes' '-p2222' '-i/k %%/id'\\''s' '-oStrictHostKeyChecking=no' -W %h:%p 'me@fe80::1'"
        );
    }

    #[test]
    fn ssh_is_told_to_ask_nobody() {
        for (text, given) in [
            ("qemu+ssh://host/system", "qemu+ssh://host/system?no_tty=1"),
            ("qemu+ssh://host/system?keyfile=/k", "qemu+ssh://host/system?keyfile=/k&no_tty=1"),
            ("qemu+ssh://host/system?no_tty=0", "qemu+ssh://host/system?no_tty=0"),
            ("qemu:///system", "qemu:///system"),
        ] {
            assert_eq!(text.parse::<ConnectUri>().unwrap().for_libvirt(), given);
        }
    }
}
