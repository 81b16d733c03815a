//! The proxies of this host, as its guests must name them. If this host reaches the internet only through a proxy, its
//! guests also need the proxy to reach a mirror or a registry.

use std::fmt::{self, Debug, Formatter};

use super::HOST_FROM_GUEST;

/// The default ports of proxies, by scheme (curl(1), --proxy).
const SCHEMES: [(&str, u16); 3] = [("https", 443), ("http", 1080), ("socks", 1080)];

/// The proxies that the environment of this process names. An address may contain a password. Therefore these values
/// are written only to the seed, and `Debug` does not show them.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Proxies {
    /// The names of the variables in lower case, with their values for the guest.
    variables: Vec<(&'static str, String)>,
}

impl Debug for Proxies {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let names = self.variables.iter().map(|(name, _)| name);
        f.debug_set().entries(names).finish()
    }
}

impl Proxies {
    /// Returns the proxies of this process's environment.
    pub fn from_env() -> Self {
        Self::of(|name| std::env::var(name).ok())
    }

    /// Returns the proxies of an environment. As in curl(1), a name in lower case wins.
    pub fn of(variable: impl Fn(&str) -> Option<String>) -> Self {
        let value = |name: &str| {
            let value = variable(name).or_else(|| variable(&name.to_uppercase()))?;
            Some(value.trim().to_owned()).filter(|value| !value.is_empty())
        };
        let proxies = ["http_proxy", "https_proxy"];
        let mut variables: Vec<_> =
            proxies.into_iter().filter_map(|name| Some((name, for_guest(&value(name)?)))).collect();
        if !variables.is_empty() {
            // The guest reaches its own servers and those of the run directly.
            let own = ["localhost", "127.0.0.1", HOST_FROM_GUEST].map(str::to_owned);
            let direct = value("no_proxy").unwrap_or_default();
            let direct = direct.split([',', ' ']).filter(|host| !host.is_empty()).map(encoded);
            variables.push(("no_proxy", own.into_iter().chain(direct).collect::<Vec<_>>().join(",")));
        }
        Self { variables }
    }

    /// Returns the ports of the proxies on this host's loopback, and of those on other hosts. The guest connects to
    /// these ports instead of to the internet.
    pub fn ports(&self) -> (Vec<u16>, Vec<u16>) {
        let proxies = self.variables.iter().filter(|(name, _)| *name != "no_proxy");
        let port = |url: &String| {
            let (scheme, rest) = url.split_once("://")?;
            let address = rest.trim_end_matches('/').rsplit('@').next()?;
            let (host, port) = address.rsplit_once(':').unwrap_or((address, ""));
            let of_scheme =
                || SCHEMES.iter().find(|(name, _)| scheme.starts_with(name)).map(|(_, port)| *port);
            Some((host == HOST_FROM_GUEST, port.parse().ok().or_else(of_scheme)?))
        };
        let (own, others): (Vec<_>, Vec<_>) =
            proxies.filter_map(|(_, url)| port(url)).partition(|(is_own, _)| *is_own);
        let ports = |proxies: Vec<(bool, u16)>| proxies.into_iter().map(|(_, port)| port).collect();
        (ports(own), ports(others))
    }

    /// Returns the parts of the addresses that contain passwords, as `user:password`. They must be in no report.
    pub fn secrets(&self) -> impl Iterator<Item = &str> {
        self.variables.iter().filter_map(|(_, url)| {
            let (login, _) = url.split_once("://")?.1.rsplit_once('@')?;
            Some(login).filter(|login| login.contains(':'))
        })
    }

    /// Returns cloud-init's `write_files` for the guest: the paths, the contents, and whether the content is appended.
    /// `/etc/environment` is read by pam_env(8) for each login, and by systemd for the services of users
    /// (environment.d(5)), such as podman's. Services of the system do not have this environment. They may call apt, so
    /// apt has a configuration of its own.
    pub fn files(&self) -> Vec<(&'static str, String, bool)> {
        let of = |name: &str| self.variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value);
        let mut apt = String::new();
        for (protocol, name) in [("http", "http_proxy"), ("https", "https_proxy")] {
            let Some(proxy) = of(name) else { continue };
            apt += &format!("Acquire::{protocol}::Proxy \"{proxy}\";\n");
            let hosts = of("no_proxy").into_iter().flat_map(|hosts| hosts.split(','));
            let is_name = |c: char| c.is_ascii_alphanumeric() || ".-".contains(c);
            for host in hosts.filter(|host| !host.starts_with('.') && host.chars().all(is_name)) {
                apt += &format!("Acquire::{protocol}::Proxy::{host} \"DIRECT\";\n");
            }
        }
        if apt.is_empty() {
            return Vec::new();
        }
        let line =
            |(name, value): &(&str, String)| format!("{name}={value}\n{}={value}\n", name.to_uppercase());
        let environment = self.variables.iter().map(line).collect();
        vec![("/etc/apt/apt.conf.d/90iot-xtask", apt, false), ("/etc/environment", environment, true)]
    }
}

/// Returns the address of a proxy as the guest must name it. An address without a scheme has the scheme HTTP (curl(1)).
fn for_guest(proxy: &str) -> String {
    let (scheme, rest) = proxy.split_once("://").unwrap_or(("http", proxy));
    let (login, address) = rest.rsplit_once('@').unwrap_or(("", rest));
    let end = match address.find(']') {
        Some(bracket) => bracket + 1,
        None => address.find([':', '/']).unwrap_or(address.len()),
    };
    let (host, port) = address.split_at(end);
    let is_loopback = host.eq_ignore_ascii_case("localhost") || host.starts_with("127.") || host == "[::1]";
    let host = if is_loopback { HOST_FROM_GUEST } else { host };
    let at = if login.is_empty() { "" } else { "@" };
    encoded(&format!("{scheme}://{login}{at}{host}{port}"))
}

/// Encodes the characters that apt, pam_env or systemd would read as a quote, a comment or a variable (RFC 3986, 2.1).
fn encoded(text: &str) -> String {
    let keep = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~:/@%[]+=*".contains(&byte);
    text.bytes()
        .map(|byte| if keep(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loopback_proxy_is_this_host_and_no_character_breaks_a_file_of_the_guest() {
        for (proxy, guest) in [
            ("http://127.0.0.1:3128", "http://10.0.2.2:3128"),
            ("localhost:3128/", "http://10.0.2.2:3128/"),
            ("http://u:p@[::1]:3128", "http://u:p@10.0.2.2:3128"),
            ("http://u:a@b#\"$c'@proxy.example:80", "http://u:a@b%23%22%24c%27@proxy.example:80"),
            ("socks5h://127.1.2.3", "socks5h://10.0.2.2"),
            ("http://[2001:db8::1]:3128", "http://[2001:db8::1]:3128"),
            ("https://localhost.example", "https://localhost.example"),
        ] {
            assert_eq!(for_guest(proxy), guest);
        }
    }

    #[test]
    fn the_variables_of_both_cases_reach_apt_and_the_environment() {
        let host = |name: &str| {
            let set = [
                ("HTTP_PROXY", "http://upper:1"),
                ("http_proxy", "http://u:secret@localhost:2"),
                ("HTTPS_PROXY", "http://proxy:3"),
                ("NO_PROXY", "mirror.example, .corp,10.0.0.0/8"),
            ];
            set.into_iter().find(|(known, _)| *known == name).map(|(_, value)| value.to_owned())
        };
        let proxies = Proxies::of(host);
        let [(_, apt, false), (_, environment, true)] = &proxies.files()[..] else { panic!("{proxies:?}") };
        for line in [
            "Acquire::http::Proxy \"http://u:secret@10.0.2.2:2\";",
            "Acquire::https::Proxy \"http://proxy:3\";",
            "Acquire::http::Proxy::mirror.example \"DIRECT\";",
        ] {
            assert!(apt.lines().any(|found| found == line), "{line}: {apt}");
        }
        assert!(!apt.contains("corp") && !apt.contains("10.0.0.0"), "apt knows only hosts: {apt}");
        for line in [
            "http_proxy=http://u:secret@10.0.2.2:2",
            "HTTPS_PROXY=http://proxy:3",
            "no_proxy=localhost,127.0.0.1,10.0.2.2,mirror.example,.corp,10.0.0.0/8",
        ] {
            assert!(environment.lines().any(|found| found == line), "{line}: {environment}");
        }
        assert!(!format!("{proxies:?}").contains("secret"), "{proxies:?}");
        assert_eq!(proxies.ports(), (vec![2], vec![3]));
        assert_eq!(proxies.secrets().collect::<Vec<_>>(), ["u:secret"]);
        let plain = |name: &str| (name == "https_proxy").then(|| "https://u:p@proxy".to_owned());
        assert_eq!(Proxies::of(plain).ports(), (vec![], vec![443]));
        let silent = |name: &str| (name == "no_proxy").then(|| "a".to_owned());
        assert!(Proxies::of(silent).files().is_empty(), "there is no proxy");
    }
}
